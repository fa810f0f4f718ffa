"""Who connects where a source is awaited: the source is found among all others, and a second
channel of it ends the migration while the source can still go on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from sharded_pc.address import TcpAddress, UnixAddress
from sharded_pc.transport import candidates
from sharded_pc.transport.channels import Kind
from sharded_pc.transport.incoming import Listener, listen
from tests.qemu import wait_until
from tests.receiver import Receiver
from tests.synthetic import WAIT_S, connect, open_source

MAGIC = b"QEVM\0\0\0\3"
MULTIFD = b"\x11\x22\x33\x44"
RECORDS = {
    "page": (0x27110000 | 0x08).to_bytes(8, "big"),
    "zero page": (0x1000 | 0x02).to_bytes(8, "big"),
    "end": (0x10).to_bytes(8, "big"),
}
STRANGERS = {
    "rubbish": b"GET / HTTP/1.0\r\n",
    "a byte": b"\xff",
    "no record of a page": b"\0\0\0\0\0\0\x10\x04",
    "an older stream": b"QEVM\0\0\0\2",
    "a port scan": None,
}


class Place:
    """A listener and everybody who connects to it, in one loop."""

    def __init__(self, kind: str, folder: Path) -> None:
        unix = UnixAddress(str(folder / "incoming"))
        self.listener = listen(unix if kind == "unix" else TcpAddress("127.0.0.1", 0))
        self.accepting: asyncio.Future
        self._sockets: list[socket.socket] = []

    def connect(self, said: bytes | None = b"", host: str = "127.0.0.1") -> socket.socket:
        """A peer that says this; None: one that closes at once."""
        where = self.listener.address
        if isinstance(where, UnixAddress):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(where.path)
        else:
            at = (where.host, where.port)
            sock = socket.create_connection(at, source_address=(host, 0))
        self._sockets.append(sock)
        if said is None:
            sock.close()
        else:
            sock.sendall(said)
        return sock

    async def source(self, sock: socket.socket) -> None:
        """`sock` is the one that was taken; nothing of it was eaten."""
        wire = await asyncio.wait_for(self.accepting, WAIT_S)
        sock.sendall(b"!")
        await until(lambda: os.read(wire.fd, 99) == MAGIC + b"!")
        wire.close()

    def close(self) -> None:
        self.listener.close()
        for sock in self._sockets:
            sock.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(BlockingIOError):
                if true():
                    return
            await asyncio.sleep(0.001)


async def closed(sock: socket.socket) -> None:
    """The other end is closed."""
    sock.setblocking(False)

    def gone() -> bool:
        try:
            return not sock.recv(1)
        except ConnectionResetError:  # it had not read all
            return True

    await until(gone)


@pytest.fixture(params=["unix", "tcp"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable:
    """Runs a scene at a place that is awaiting its source."""

    async def play(scene: Callable[[Place], Awaitable[None]]) -> None:
        place = Place(request.param, tmp_path)
        place.accepting = asyncio.ensure_future(place.listener.accept())
        try:
            await scene(place)
        finally:
            place.accepting.cancel()
            place.close()
            await asyncio.gather(place.accepting, return_exceptions=True)

    return lambda scene: asyncio.run(play(scene))


# --- the source among others ---


def test_a_silent_peer_does_not_keep_the_source_out(run, caplog):
    async def scene(place: Place) -> None:
        place.connect()
        await place.source(place.connect(MAGIC))

    run(scene)
    assert caplog.text == ""


@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_is_closed_and_the_place_listens_on(run, caplog, who):
    async def scene(place: Place) -> None:
        stranger = place.connect(STRANGERS[who])
        if STRANGERS[who]:
            await closed(stranger)
        await until(lambda: bool(caplog.records))
        await place.source(place.connect(MAGIC))

    run(scene)
    assert len(caplog.records) == 1 and " closed: it " in caplog.text


def test_a_magic_may_come_in_pieces(run):
    async def scene(place: Place) -> None:
        sock = place.connect(MAGIC[:3])
        other = place.connect(MULTIFD[:2])
        await asyncio.sleep(0)
        other.close()
        sock.sendall(MAGIC[3:])
        await place.source(sock)

    run(scene)


def test_whoever_says_nothing_is_closed_in_time(run, caplog, monkeypatch):
    """Also one that stops in the middle of the magic."""
    monkeypatch.setattr(candidates, "CANDIDATE_SECONDS", 0.05)

    async def scene(place: Place) -> None:
        for said in (b"", MAGIC[:4]):
            await closed(place.connect(said))
        await place.source(place.connect(MAGIC))

    run(scene)
    assert len(caplog.records) == 2 and "did not say for 0.05 s" in caplog.text


def test_many_strangers_wait_their_turn(run, monkeypatch):
    """They cannot take all descriptors, and the source gets its turn."""
    monkeypatch.setattr(candidates, "MAX_CANDIDATES", 2)
    monkeypatch.setattr(candidates, "CANDIDATE_SECONDS", 0.05)

    async def scene(place: Place) -> None:
        for _ in range(6):
            place.connect()
        await place.source(place.connect(MAGIC))

    run(scene)


def test_a_channel_of_multifd_may_come_first(run):
    """A source that has its main channel connected has said nothing there yet."""

    async def scene(place: Place) -> None:
        place.connect(MULTIFD)
        await place.source(place.connect(MAGIC))
        channel = await asyncio.wait_for(place.listener.channel(), WAIT_S)
        assert channel.kind is Kind.MULTIFD and channel.sock.recv(99) == MULTIFD
        channel.sock.close()

    run(scene)


# --- when the source is found ---


async def found(place: Place) -> Listener:
    await place.source(place.connect(MAGIC))
    return place.listener


@pytest.mark.parametrize("early", [True, False])
def test_a_silent_second_channel_of_the_source(run, monkeypatch, early):
    """Whether it connects before its source is known or after; no time limit hides it."""
    monkeypatch.setattr(candidates, "CANDIDATE_SECONDS", 0.05 if not early else 9)

    async def scene(place: Place) -> None:
        if early:
            place.connect()
        listener = await found(place)
        if not early:
            place.connect()
            await asyncio.sleep(0.1)  # longer than anybody else may be silent
        assert listener.settle()

    run(scene)


def test_one_that_nobody_has_looked_at_yet_counts(run):
    async def scene(place: Place) -> None:
        listener = await found(place)
        place.connect()
        assert listener.settle()

    run(scene)


def test_a_channel_of_multifd_is_told_at_once(run):
    async def scene(place: Place) -> None:
        listener = await found(place)
        second = asyncio.ensure_future(listener.channel())
        place.connect(STRANGERS["rubbish"])
        await asyncio.sleep(0)
        assert not second.done()
        place.connect(MULTIFD)
        channel = await asyncio.wait_for(second, WAIT_S)
        assert channel.kind is Kind.MULTIFD and channel.sock.recv(99) == MULTIFD
        channel.sock.close()

    run(scene)


@pytest.mark.parametrize("where", ["early", "late"])
@pytest.mark.parametrize("record", RECORDS)
def test_pages_without_a_magic_are_postcopy_preempt(run, where, record):
    """7.2's channel is there before its source is known, a newer one comes at the switch; both
    speak late, and byte by byte if the wire is slow."""

    async def scene(place: Place) -> None:
        early = place.connect() if where == "early" else None
        listener = await found(place)
        coming = asyncio.ensure_future(listener.channel())
        sock = early or place.connect()
        for byte in RECORDS[record]:
            assert not coming.done()
            sock.sendall(bytes([byte]))
            await asyncio.sleep(0)
        channel = await asyncio.wait_for(coming, WAIT_S)
        assert channel.kind is Kind.PREEMPT and channel.sock.recv(99) == RECORDS[record]
        channel.sock.close()

    run(scene)


def test_pages_from_another_host_are_a_stranger(tmp_path, caplog):
    async def scene() -> None:
        place = Place("tcp", tmp_path)
        place.accepting = asyncio.ensure_future(place.listener.accept())
        listener = await found(place)
        await closed(place.connect(RECORDS["page"], host="127.0.0.2"))
        listener.close()
        place.close()

    asyncio.run(scene())
    assert "127.0.0.2 closed: it is no source" in caplog.text


def test_a_channel_that_nobody_took_is_closed(run):
    async def scene(place: Place) -> None:
        listener = await found(place)
        sock = place.connect(RECORDS["page"])
        await asyncio.sleep(0.05)
        listener.close()
        await closed(sock)

    run(scene)


@pytest.mark.parametrize("who", [*STRANGERS, "a second source"])
def test_a_stranger_in_set_up_is_nobody(run, caplog, who):
    async def scene(place: Place) -> None:
        listener = await found(place)
        second = asyncio.ensure_future(listener.channel())
        stranger = place.connect(STRANGERS.get(who, MAGIC))
        if stranger.fileno() >= 0:
            await closed(stranger)
        await until(lambda: bool(caplog.records))
        assert not listener.settle() and not second.done()
        second.cancel()

    run(scene)


def test_a_silent_stranger_from_another_host_is_nobody(tmp_path, caplog):
    async def scene() -> None:
        place = Place("tcp", tmp_path)
        place.accepting = asyncio.ensure_future(place.listener.accept())
        listener = await found(place)
        stranger = place.connect(host="127.0.0.2")
        assert not listener.settle()
        await closed(stranger)
        listener.close()
        place.close()

    asyncio.run(scene())
    assert "127.0.0.2 closed: it said nothing" in caplog.text


# --- whole receivers ---


@contextlib.contextmanager
def silent_process(path: str) -> Iterator[None]:
    """Another process that has connected and says nothing."""
    code = f"import socket; s = socket.socket(1); s.connect({path!r}); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.stdin.close()


@pytest.mark.uffd
def test_a_migration_among_strangers(tmp_path, unique_name):
    """Silent ones, a port scan and rubbish, before the source and while it sets up."""
    with Receiver(tmp_path, unique_name, keep=False) as receiver, contextlib.ExitStack() as stack:

        def strangers() -> None:
            stack.enter_context(silent_process(path))
            connect(receiver.uri()).close()
            with connect(receiver.uri()) as sock:
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")

        path = receiver.uri().removeprefix("unix:")
        strangers()
        source = stack.enter_context(open_source(connect(receiver.uri())))
        source.set_up()
        wait_until(lambda: 1 in source.back.pongs, "the source to be found", WAIT_S)
        strangers()
        source.precopy()
        source.switch()
        source.end()
        outcome = receiver.finish()
    assert outcome.exit_code == 0
    assert sum("closed: it said nothing" in line for line in outcome.errors) == 2
    assert sum("begins with 47 45 54" in line for line in outcome.errors) == 2


@pytest.mark.uffd
def test_a_channel_of_multifd_that_opens_badly_ends_the_migration(tmp_path, unique_name):
    with (
        Receiver(tmp_path, unique_name, keep=False) as receiver,
        open_source(connect(receiver.uri())) as source,
        connect(receiver.uri()) as second,
    ):
        second.sendall(MULTIFD + bytes(60))
        source.set_up()
        outcome = receiver.finish(timeout=10)
    assert outcome.exit_code == 4 and len(outcome.errors) == 1
    assert "multifd: version 0, expected 1" in outcome.errors[0]
    assert outcome.info["postcopy-state"] in ("none", "advise")
