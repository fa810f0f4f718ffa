"""A source whose memory is hugetlbfs: it discards, is asked for and sends huge pages whole; here
each 4096 bytes of them are visible as they arrive."""

from __future__ import annotations

import contextlib
import functools
import operator
import struct
from array import array
from collections.abc import Iterator

import pytest

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.testing.oracle import PageOracle
from sharded_pc.wire import writer as w
from sharded_pc.wire.feed import read_stream
from tests.control import Control
from tests.guest_process import GuestProcess
from tests.qemu import wait_until
from tests.synthetic import WAIT_S, Background, Receiving, StepSource, connect, open_source
from tests.workers import kill

MIB = 1 << 20
HUGE = 2 * MIB
GIGANTIC = 1 << 30
HUGE_PAGES = HUGE // PAGE_BYTES
RAM = RamBlock("huge", 4 * HUGE, source_page_size=HUGE)
PAGES = PageOracle((RAM, RamBlock("pc.bios", 256 << 10)), seed=5)


# --- the block list ---

LISTS = {
    "huge and normal": PAGES.blocks,
    "the last one is huge": (RamBlock("rom", PAGE_BYTES), RAM),
    "only huge": (RAM,),
    "1 GiB": (RamBlock("g", 2 * GIGANTIC, source_page_size=GIGANTIC), RAM, RamBlock("rom", 8192)),
    "a summary and no huge block": (RamBlock("rom", 8192),),
}


def summary(blocks: tuple[RamBlock, ...]) -> int:
    return functools.reduce(operator.or_, (block.source_page_size for block in blocks)) | HUGE


def begin(blocks: tuple[RamBlock, ...], summed: int | None = None) -> bytes:
    advise = w.postcopy_advise(summary(blocks) if summed is None else summed)
    return w.header() + w.configuration("pc") + advise + w.ram_setup(blocks)


@pytest.mark.parametrize("name", LISTS)
def test_block_list(name):
    stream, found = begin(LISTS[name]), []
    for at in range(1, len(stream)):
        feed = read_stream(found.append)
        feed.feed(stream[:at])
        feed.feed(stream[at:])
        assert found.pop() == LISTS[name]


def sized(page: int, size: int = 2 * HUGE, summed: int = PAGE_BYTES | HUGE) -> bytes:
    """A list of one block, with whatever stands behind its size."""
    start = w.ram_setup((RamBlock("huge", size),))
    at = start.index(b"\4huge") + 5 + 8
    raw = start[:at] + struct.pack(">Q", page) + start[at:]
    return w.header() + w.configuration("pc") + w.postcopy_advise(summed) + raw


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (sized(0), "block 'huge' with pages of 0x0 bytes, expected one of 0x201000"),
        (sized(PAGE_BYTES), "with pages of 0x1000 bytes"),
        (sized(3 * PAGE_BYTES), "with pages of 0x3000 bytes"),
        (sized(2 * HUGE), "with pages of 0x400000 bytes, expected one of 0x201000"),
        (sized(HUGE, HUGE + PAGE_BYTES), "not a whole number of 2097152-byte pages"),
    ],
)
def test_bad_block_list(stream, error):
    with pytest.raises(RemoteProtocolError, match=error):
        read_stream().feed(stream)


# --- migrations ---


@contextlib.contextmanager
def migrating(tmp_path, name: str, **settings) -> Iterator[tuple]:
    """A receiver, its source after the switch, and a guest that is attached."""
    with (
        Receiving(tmp_path, name, **settings) as receiver,
        GuestProcess(PAGES) as guest,
        open_source(receiver.sock, PAGES) as source,
    ):
        source.begin()
        source.wait_switched()
        guest.ask("attach", receiver.attach)
        yield receiver, source, guest


def asked(source: StepSource) -> tuple[int, int]:
    """The oldest request: (start, length)."""
    assert source.back.wait_request(WAIT_S) and source.back.requests, "no request came"
    request = source.back.requests.popleft()
    assert request.block == "huge"
    return request.start, request.length


def complete(receiver: Receiving, source: StepSource, guest: GuestProcess) -> None:
    Background(source.end).result()
    info = receiver.finish()
    assert guest.ask("visit_all") == []
    assert [b["received-pages"] for b in info["blocks"]] == [b.pages for b in PAGES.blocks]


def claimed(receiver: Receiving, page: int) -> bool:
    memory = receiver.coordinator.memory
    return memory.requested.test(memory.control.block(0)[2] + page)


pytestmark = [pytest.mark.uffd]


@pytest.mark.usefixtures("placement")
class TestMigration:
    def test_a_huge_page_is_asked_for_once(self, tmp_path, unique_name):
        """However many of its pages are waited for, by whichever shard's guests; each is visible as
        it comes."""
        first = 2 * HUGE_PAGES
        waited = [first + n for n in (300, 7, 8, 130, 500)]
        with migrating(tmp_path, unique_name) as (receiver, source, guest):
            guest.say("visit", 0, waited[:1])
            assert asked(source) == (2 * HUGE, HUGE)
            source.send_pages(0, range(first, first + 301))
            assert guest.answer() is None, "the rest of the huge page is still there"
            guest.say("visit", 0, waited[1:4])
            assert guest.answer() is None
            guest.say("visit", 0, waited[4:])
            wait_until(lambda: claimed(receiver, waited[4]), "the claim", WAIT_S)
            assert guest.silent() and not source.back.requests
            source.send_pages(0, range(first + 301, first + HUGE_PAGES))
            assert guest.answer() is None
            guest.say("visit", 0, [0])
            assert asked(source) == (0, HUGE)
            source.send_pages(0, range(HUGE_PAGES))
            assert guest.answer() is None
            complete(receiver, source, guest)
        assert receiver.coordinator.memory.geometry.blocks[0].source_page_size == HUGE

    def test_many_readers(self, tmp_path, unique_name):
        """Requests are what a source with huge pages takes, and few."""
        with migrating(tmp_path, unique_name, workers=3) as (receiver, source, guest):
            guest.say("visit_all", 1, threads=4)
            wait_until(lambda: source.back.requests, "requests", WAIT_S)
            Background(source.postcopy).result()
            assert guest.answer() == []
            source.finish()
            info = receiver.finish()
        assert 0 < info["ram"]["postcopy-requests"] <= 4 * (RAM.size // HUGE) + 64

    def test_a_worker_dies(self, tmp_path, unique_name):
        with migrating(tmp_path, unique_name) as (receiver, source, guest):
            guest.say("visit", 0, [HUGE_PAGES + 70])
            assert asked(source) == (HUGE, HUGE)
            source.send_pages(0, range(HUGE_PAGES, HUGE_PAGES + 70))
            for index in (0, 1):
                kill(receiver, index)
                assert asked(source) == (HUGE, HUGE), "once, though it spans several shards"
            assert not source.back.requests
            source.send_pages(0, range(HUGE_PAGES + 70, 2 * HUGE_PAGES))
            assert guest.answer() is None
            complete(receiver, source, guest)

    def test_recovery_in_the_middle_of_a_huge_page(self, tmp_path, unique_name):
        """What came of it is not sent again; what is missing is asked for again, as a whole."""
        path, uri = str(tmp_path / "control"), f"unix:{tmp_path}/again"
        with (
            migrating(tmp_path, unique_name, control=path) as (receiver, source, guest),
            contextlib.closing(Control(path)) as control,
        ):
            guest.say("visit", 0, [HUGE_PAGES + 400])
            assert asked(source) == (HUGE, HUGE)
            before = receiver.received()
            pages = array("Q", range(HUGE_PAGES, HUGE_PAGES + 100))
            source.send_pages(0, pages)
            receiver.wait_received(before + 100)
            source._sock.shutdown(2)
            control.wait_status("postcopy-paused")
            assert control.execute("migrate-recover", uri=uri) == {}
            with contextlib.closing(connect(uri)) as sock:
                source.resume(sock)
                assert not any(source._missing[0][page] for page in pages)
                assert asked(source) == (HUGE, HUGE)
                assert not source.back.requests
                guest_too = HUGE_PAGES + 200
                source.send_pages(0, range(HUGE_PAGES + 100, 2 * HUGE_PAGES))
                assert guest.answer() is None
                guest.say("visit", 0, [guest_too])
                assert guest.answer() is None
                complete(receiver, source, guest)

    def test_a_discard_is_whole_huge_pages(self, tmp_path, unique_name):
        with (
            Receiving(tmp_path, unique_name) as receiver,
            open_source(receiver.sock, PAGES) as source,
        ):
            source.set_up()
            source.precopy()
            source._send(w.discard("huge", [(HUGE, PAGE_BYTES)]))
            with pytest.raises(RemoteProtocolError, match="not whole 2097152-byte pages"):
                receiver.finish()
