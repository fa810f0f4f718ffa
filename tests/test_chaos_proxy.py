"""The chaos proxy: what goes through comes out whole and in order; each fault really happens, at
its byte."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sharded_pc.address import Address, TcpAddress, UnixAddress
from sharded_pc.testing.chaos import ChaosProxy
from sharded_pc.testing.faults import BOTH, FINE, Fault, Kind, Way, Weather, storm
from tests.synthetic import WAIT_S, Background

DATA = random.Random(5).randbytes(300_000)
KINDS = {"unix": socket.AF_UNIX, "tcp": socket.AF_INET}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@contextlib.contextmanager
def proxied(tmp_path: Path, kind: str, plan: Callable[[int], Weather]) -> Iterator[tuple]:
    """(proxy, connect): each connect() gives both ends of another connection through it."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(KINDS[kind]))
        listening.settimeout(WAIT_S)
        listening.bind(str(tmp_path / "far") if kind == "unix" else ("127.0.0.1", 0))
        listening.listen()
        unix = kind == "unix"
        near = UnixAddress(str(tmp_path / "near")) if unix else TcpAddress("127.0.0.1", 0)
        name = listening.getsockname()
        far = UnixAddress(name) if unix else TcpAddress(*name)
        proxy = stack.enter_context(ChaosProxy(near, far, plan))

        def connect() -> tuple[socket.socket, socket.socket]:
            ends = dial(proxy.address), listening.accept()[0]
            for end in ends:
                end.settimeout(WAIT_S)
                stack.callback(end.close)
            return ends

        yield proxy, connect


def dial(address: Address) -> socket.socket:
    if isinstance(address, TcpAddress):
        return socket.create_connection((address.host, address.port), WAIT_S)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address.path)
    return sock


def send(sock: socket.socket, data: bytes = DATA) -> None:
    """All of it, and the end; as far as the other side takes it."""
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def read(sock: socket.socket, size: int | None = None) -> bytes:
    """Everything up to its end, or so much."""
    got = bytearray()
    while size is None or len(got) < size:
        data = sock.recv(1 << 16 if size is None else size - len(got))
        if not data:
            break
        got += data
    return bytes(got)


def is_quiet(sock: socket.socket, seconds: float) -> bool:
    return not select.select([sock], [], [], seconds)[0]


@pytest.mark.parametrize("weather", [
    FINE, Weather(piece_bytes=1 << 12, seed=3), Weather(piece_bytes=1 << 16, delay_s=0.001),
    Weather((Fault(Kind.STALL, 1000, seconds=0.01), Fault(Kind.STALL, 1000, seconds=0.01),
             Fault(Kind.CALL, 0), Fault(Kind.STALL, 99, Way.BACK, seconds=0.02))),
])  # fmt: skip
def test_all_comes_through(tmp_path, kind, weather):
    """Both ways at once, each with its own end."""
    back = DATA[::-1]
    with proxied(tmp_path, kind, lambda _: weather) as (proxy, connect):
        near, far = connect()
        senders = [Background(lambda: send(near)), Background(lambda: send(far, back))]
        reading = Background(lambda: read(near))
        assert read(far) == DATA
        assert reading.result() == back
        for sender in senders:
            sender.result()
        assert len(proxy.happened) == len(weather.faults)
        assert proxy.forwarded(0) == {Way.FORTH: len(DATA), Way.BACK: len(DATA)}


def test_one_direction_may_end_first(tmp_path, kind):
    with proxied(tmp_path, kind, lambda _: FINE) as (_, connect):
        near, far = connect()
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""
        far.sendall(b"still here")
        assert read(near, 10) == b"still here"
        far.close()
        assert near.recv(1) == b""


def test_pieces_are_odd(tmp_path):
    """What is written at once is what can be read at once, if the reader is quick enough."""
    with proxied(tmp_path, "unix", lambda _: Weather(piece_bytes=512, delay_s=0.002)) as parts:
        near, far = parts[1]()
        send(near, DATA[:4000])
        sizes = []
        while data := far.recv(1 << 16):
            sizes.append(len(data))
    assert sum(sizes) == 4000
    assert max(sizes) <= 2048, "some may have come together"
    assert len({size % 16 for size in sizes}) > 3, "odd ones"


@pytest.mark.parametrize("at", [0, 1, 70_000])
@pytest.mark.parametrize("end", [Kind.CUT, Kind.SILENCE])
def test_an_end_comes_at_its_byte(tmp_path, kind, at, end):
    """Not a byte later; and the next connection goes through."""
    weather = Weather((Fault(end, at),), piece_bytes=5000)
    with proxied(tmp_path, kind, lambda n: FINE if n else weather) as (proxy, connect):
        near, far = connect()
        sending = Background(lambda: send(near))
        assert read(far, at) == DATA[:at]
        assert proxy.wait_happened(1, WAIT_S)
        assert proxy.happened == [(0, weather.faults[0])]
        check_end(end, near, far)
        hang_up(near)
        sending.result()
        near, far = connect()
        near.sendall(b"again")
        assert read(far, 5) == b"again"


def check_end(end: Kind, near: socket.socket, far: socket.socket) -> None:
    if end is Kind.CUT:
        assert near.recv(1) == far.recv(1) == b""
        return
    assert is_quiet(near, 0.05)
    assert is_quiet(far, 0)
    hang_up(near)
    assert is_quiet(far, 0.05), "nobody hears of it"


@pytest.mark.parametrize("at", [1, 70_000])
def test_a_reset_is_one(tmp_path, at):
    """RST takes along what the other side had not read yet."""
    with proxied(tmp_path, "tcp", lambda _: Weather((Fault(Kind.RESET, at),))) as (_, connect):
        near, far = connect()
        sending = Background(lambda: send(near))
        got = bytearray()
        with pytest.raises(ConnectionResetError):
            while data := far.recv(1 << 16):
                got += data
        assert DATA[:at].startswith(got)
        sending.result()


def hang_up(sock: socket.socket) -> None:
    """Nobody's thread waits in it any more."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def test_a_dropped_silence_ends(tmp_path, kind):
    with proxied(tmp_path, kind, lambda _: Weather((Fault(Kind.SILENCE, 3),))) as parts:
        proxy, connect = parts
        near, far = connect()
        near.sendall(b"abcdef")
        assert proxy.wait_happened(1, WAIT_S)
        proxy.drop()
        assert (read(far), near.recv(1)) == (b"abc", b"")


@pytest.mark.parametrize("ways", [BOTH, (Way.FORTH,), (Way.BACK,)])
def test_a_stall_holds_up_what_it_names(tmp_path, kind, ways):
    stall = Fault(Kind.STALL, 4, ways=ways, seconds=0.3)
    with proxied(tmp_path, kind, lambda _: Weather((stall,))) as (proxy, connect):
        near, far = connect()
        near.sendall(b"stal")
        assert read(far, 4) == b"stal"
        assert proxy.wait_happened(1, WAIT_S)
        since = time.monotonic()
        near.sendall(b"forth")
        far.sendall(b"back")
        assert (read(far, 5), read(near, 4)) == (b"forth", b"back")
        assert time.monotonic() - since > 0.25, "it was held up"
    if ways != BOTH:
        quick = Way.BACK if ways == (Way.FORTH,) else Way.FORTH
        assert quick not in ways


def test_the_way_back_is_counted_by_itself(tmp_path, kind):
    with proxied(tmp_path, kind, lambda _: Weather((Fault(Kind.CUT, 3, Way.BACK),))) as parts:
        near, far = parts[1]()
        near.sendall(b"question")
        assert read(far, 8) == b"question"
        far.sendall(b"answer")
        assert read(near) == b"ans"


def test_the_target_may_move(tmp_path):
    with proxied(tmp_path, "unix", lambda _: FINE) as (proxy, connect):
        connect()
        proxy.target = UnixAddress(str(tmp_path / "nobody"))
        with dial(proxy.address) as lost:
            lost.settimeout(WAIT_S)
            assert lost.recv(1) == b"", "nobody listens there"
        proxy.target = UnixAddress(str(tmp_path / "far"))
        near, far = connect()
        near.sendall(b"x")
        assert far.recv(1) == b"x"


def test_an_error_of_the_owner_is_the_owners(tmp_path):
    def explode(number: int) -> Weather:
        raise RuntimeError("no plan")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no plan"), proxied(tmp_path, "unix", explode) as parts:
        near, _ = parts[1]()
        assert near.recv(1) == b""
    assert threading.active_count() == before
    assert not (tmp_path / "near").exists()


def test_the_same_seed_is_the_same_storm():
    storms = [storm(seed, 1 << 20, most=9, end=Kind.CUT) for seed in (1, 1, 2)]
    assert storms[0] == storms[1] != storms[2]
    firsts = [next(weather.pieces(Way.FORTH)) for weather in storms]
    assert firsts[0] == firsts[1] != firsts[2]
    assert next(storms[0].pieces(Way.BACK)) != firsts[0]


def test_the_same_storm_happens_again(tmp_path):
    """Not only on paper."""
    weather = storm(7, 200_000, most=6, end=Kind.CUT)
    runs = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        with proxied(folder, "unix", lambda _: weather) as (proxy, connect):
            near, far = connect()
            sending = Background(lambda near=near: send(near))
            got = read(far)
            hang_up(near)
            sending.result()
            runs.append((got, list(proxy.happened)))
    assert runs[0] == runs[1]
    assert runs[0][0] == DATA[: weather.faults[-1].at]
