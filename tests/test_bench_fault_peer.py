"""`sharded-pc bench fault --peer qemu`: the page service, the guest's program, one small run."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator

import pytest

from sharded_pc.bench import fault_image, fault_peer
from sharded_pc.errors import RemoteProtocolError
from sharded_pc.native.floor import WrongByte
from sharded_pc.native.page_service import PATTERN_KEY, PageService, pattern
from sharded_pc.native.ram import NotYet, Stop, Stopped, WireClosed
from sharded_pc.wire import return_path, writer
from sharded_pc.wire.constants import Rp
from sharded_pc.wire.return_path import req_pages
from tests.test_bench import bench, measured

BLOCK = "pc.ram"
FIRST, PAGES = 16, 4
PAGE = 4096
SECONDS = 5


class Kit:
    """A service over FIRST.. and the receiver's end of its wire."""

    def __init__(self, pages: int = PAGES) -> None:
        self.theirs, self._ours = socket.socketpair()
        self.theirs.settimeout(SECONDS)
        self.stop = Stop()
        self.service = PageService(self._ours.fileno(), self.stop, BLOCK, FIRST, pages)

    def ask(self, page: int, pages: int = 1, block: str | None = BLOCK) -> None:
        self.theirs.sendall(req_pages(page * PAGE, pages * PAGE, block))

    def run(self) -> None:
        """Until it is idle; it must not be done."""
        with pytest.raises(NotYet):
            self.service.run(0)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (more := self.theirs.recv(size - len(data))):
            data += more
        return data

    def nothing_more(self) -> bool:
        self.theirs.setblocking(False)
        try:
            return not self.theirs.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.theirs.settimeout(SECONDS)

    def close(self) -> None:
        for end in (self.theirs, self._ours, self.stop):
            end.close()


@pytest.fixture
def kit() -> Iterator[Kit]:
    made = Kit()
    yield made
    made.close()


def record(page: int, *, named: bool = False) -> bytes:
    return writer.page(BLOCK if named else None, page * PAGE, pattern(page))


def test_a_page_holds_its_addresses() -> None:
    words = memoryview(pattern(4097)).cast("I")
    assert list(words) == [(4097 * PAGE + 4 * i) ^ PATTERN_KEY for i in range(PAGE // 4)]


def test_each_page_is_answered_and_the_end_is_told(kit: Kit) -> None:
    order = [18, 16, 19, 17]
    kit.ask(order[0])
    for page in order[1:]:
        kit.ask(page, block=None)
    kit.service.run(1000)
    expected = b"".join(record(page, named=page == order[0]) for page in order)
    assert kit.read(len(expected)) == expected
    assert kit.nothing_more()
    assert (kit.service.requests, kit.service.answered) == (4, 4)


def test_a_range_is_answered_page_by_page(kit: Kit) -> None:
    kit.ask(FIRST, PAGES)
    kit.service.run(1000)
    expected = b"".join(record(FIRST + i, named=i == 0) for i in range(PAGES))
    assert kit.read(len(expected)) == expected
    assert kit.service.requests == 1


def test_a_page_is_sent_once(kit: Kit) -> None:
    kit.ask(17)
    kit.ask(17)
    kit.run()
    kit.ask(17)
    kit.run()
    expected = record(17, named=True)
    assert kit.read(len(expected)) == expected
    assert kit.nothing_more()
    assert (kit.service.requests, kit.service.answered) == (3, 1)


def test_what_is_not_served_is_passed_over(kit: Kit) -> None:
    kit.theirs.sendall(return_path.pong(3))
    kit.ask(FIRST - 1)
    kit.ask(FIRST + PAGES)
    kit.ask(1 << 50)
    kit.ask(FIRST, block="pc.bios")
    kit.ask(FIRST + 1, block=None)  # of pc.bios
    kit.theirs.sendall(return_path.shut(0))
    kit.run()
    assert kit.service.answered == 0
    assert kit.nothing_more()


def test_messages_come_in_pieces(kit: Kit) -> None:
    for byte in return_path.pong(1) + req_pages(17 * PAGE, PAGE, BLOCK):
        assert kit.service.answered == 0
        kit.theirs.sendall(bytes([byte]))
        kit.run()
    assert kit.service.answered == 1
    kit.theirs.sendall(return_path.shut(0)[:5])
    kit.run()
    assert kit.service.unread == return_path.shut(0)[:5]


def check_stops(kit: Kit) -> None:
    """The service, on a thread, ends once it has answered something."""
    ended: list[Stopped] = []

    def serve() -> None:
        try:
            kit.service.run(-1)
        except Stopped as stopped:
            ended.append(stopped)

    thread = threading.Thread(target=serve)
    thread.start()
    kit.read(len(record(FIRST, named=True)))
    kit.stop.set()
    thread.join(SECONDS)
    assert ended
    assert not thread.is_alive()


def test_stop_ends_it_while_it_waits(kit: Kit) -> None:
    kit.ask(FIRST)
    check_stops(kit)


def test_stop_ends_it_while_nobody_reads() -> None:
    many = 1 << 16
    kit = Kit(many)
    kit.ask(FIRST, many)
    check_stops(kit)
    assert 0 < kit.service.answered < many
    kit.close()


def test_the_receiver_has_gone(kit: Kit) -> None:
    kit.theirs.close()
    with pytest.raises(WireClosed):
        kit.service.run(1000)


@pytest.mark.parametrize(
    "raw",
    [
        b"\0\0\0\0",
        b"\0\x63\0\0",
        return_path.message(Rp.REQ_PAGES, b"short"),
        return_path.message(Rp.REQ_PAGES_ID, bytes(12)),
        return_path.message(Rp.REQ_PAGES_ID, bytes(12) + b"\x05abc"),
        b"\0\x02\xff\xff",
    ],
)
def test_what_is_no_return_path(kit: Kit, raw: bytes) -> None:
    kit.theirs.sendall(raw)
    with pytest.raises(RemoteProtocolError, match="malformed"):
        kit.service.run(1000)


# --- the guest ---


def test_the_guest_touches_every_page_once_in_a_jumping_order() -> None:
    order = fault_image.order(4096)
    assert sorted(order) == list(range(4096))
    assert sum(b == a + 1 for a, b in itertools.pairwise(order)) < 10


@pytest.mark.parametrize("size", [0, 4095, 3 * PAGE, 1 << 34])
def test_a_size_the_guest_cannot_do(size: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        fault_image.program(size)


# --- the bench ---


@pytest.mark.qemu
@pytest.mark.uffd
@pytest.mark.timeout(90)
def test_both_receivers_page_in_the_whole_guest() -> None:
    small = ("--size", "16M", "--repeat", "1", "--workers", "2", "--placement", "copy")
    told = measured("fault", "--peer", "qemu", *small)
    assert [(r["receiver"], r["wrong-words"], r["requests"]) for r in told["runs"]] == [
        ("qemu", 0, 4096),
        ("product", 0, 4096),
    ]
    assert told["guest"]["ticks-per-us"] > 1
    (row,) = told["results"]
    assert (row["placement"], row["workers"]) == ("copy", 2)
    for figure in ("p50-us", "p90-us", "p99-us", "p99.9-us", "faults-per-second"):
        assert row[figure].keys() == {"product", "qemu", "ratio"}
        assert all(row[figure][part]["median"] > 0 for part in row[figure])


@pytest.mark.qemu
@pytest.mark.timeout(90)
def test_a_guest_that_reads_wrong_words_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_image, "PATTERN_KEY", PATTERN_KEY ^ 1)
    settings = fault_peer.PeerFaultSettings(16 << 20, (1,), ("copy",), 1)
    with pytest.raises(WrongByte, match="8192 wrong words of 8192"):
        fault_peer.run(settings)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--peer", "xen"],
        ["--peer", "qemu", "--threads", "2"],
        ["--peer", "qemu", "--size", "48M"],
        ["--peer", "qemu", "--size", "2G"],
        ["--peer", "qemu", "--placement", "both"],
    ],
    ids=" ".join,
)
def test_bad_options(arguments: list[str]) -> None:
    done = bench("fault", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
