"""The header's fourteen names drive whole migrations: one process with one shard, two with two."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import threading
from array import array
from multiprocessing import reduction

import pytest

from sharded_pc import postcopy_ram as pc
from sharded_pc.errors import LocalProtocolError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.native import oracle
from sharded_pc.native.core import ffi
from sharded_pc.native.uffd import Uffd
from sharded_pc.testing.oracle import PageOracle, runs
from sharded_pc.wire import events
from sharded_pc.wire.commands import command
from sharded_pc.wire.feed import Feed
from sharded_pc.wire.steps import number

pytestmark = pytest.mark.uffd

BLOCKS = (RamBlock("pc.ram", 5 << 20), RamBlock("vga.vram", 1 << 20))
"""pc.ram is no multiple of a stripe (2 MiB)."""
ORACLE = PageOracle(BLOCKS, seed=7, zero_share=0.2)


class GuestMapping:
    """A guest's own mappings of all blocks in this process, one userfaultfd for each shard."""

    def __init__(self, mis: pc.MigrationIncomingState) -> None:
        self.maps = [mmap.mmap(s.fd, s.size, mmap.MAP_SHARED) for s in mis.memory.blocks]
        self.addresses = [int(ffi.cast("uintptr_t", ffi.from_buffer(m))) for m in self.maps]
        self.uffds = [Uffd.open() for _ in range(mis.geometry.shards)]
        for extent in mis.geometry.extents():
            at = self.addresses[mis.geometry.index(extent.block)] + extent.offset
            self.uffds[extent.shard].register(at, extent.size)

    def visit(self, result: list) -> None:
        """Touches every page of every block and checks it; appends (right, pages) per block."""
        for block, ram in enumerate(BLOCKS):
            pages = array("Q", range(ram.pages))
            right, _ = oracle.visit(
                self.maps[block], ORACLE.seed, block, pages, ORACLE.final(block)
            )
            result.append((right, ram.pages))


def discard_commands(raw: bytes) -> list[events.RamDiscard]:
    """Reads a stream of nothing but commands."""

    def commands():
        while True:
            yield from number(1)
            yield (yield from command())

    return Feed(commands()).feed(raw)


def precopy(mis: pc.MigrationIncomingState, block: int) -> None:
    """What a destination writes before postcopy: plain data, straight into the segment (its own
    mapping is registered, so that touching it would wait)."""
    segment, ram = mis.memory.blocks[block], BLOCKS[block]
    for page, version in enumerate(ORACLE.precopied(block)):
        if mis.owns(ram.name, page * PAGE_BYTES):
            os.pwrite(segment.fd, ORACLE.page(block, page, version), page * PAGE_BYTES)
            mis.memory.received.set(mis.memory.control.block(block)[2] + page, 1)


def dirty(block: int) -> bytearray:
    old, new = ORACLE.precopied(block), ORACLE.final(block)
    return bytearray(a != b for a, b in zip(old, new, strict=True))


def send_discards() -> bytes:
    """The source's side: what changed since precopy, by the discard functions."""
    sent: list[bytes] = []
    ms = pc.MigrationState(sent.append)
    for block, ram in enumerate(BLOCKS):
        pds = pc.postcopy_discard_send_init(ms, ram.name)
        for first, count in runs(dirty(block)):
            pc.postcopy_discard_send_range(ms, pds, first, count)
        pc.postcopy_discard_send_finish(ms, pds)
    return b"".join(sent)


def place(mis: pc.MigrationIncomingState, name: str, offset: int) -> None:
    """The source's answer to a request, placed."""
    block, page = mis.geometry.index(name), offset // PAGE_BYTES
    version = ORACLE.final(block)[page]
    host = mis.host(name, offset)
    if version == 0:
        assert pc.postcopy_place_page_zero(mis, host, name) == 0
        return
    tmp = pc.postcopy_get_tmp_page(mis)
    tmp[:] = ORACLE.page(block, page, version)
    assert pc.postcopy_place_page(mis, host, tmp, name) == 0


def prepare(mis: pc.MigrationIncomingState) -> None:
    """incoming_init, precopy, discards."""
    assert pc.postcopy_ram_supported_by_host(mis), mis.unsupported
    assert pc.postcopy_ram_incoming_init(mis, mis.geometry.total // PAGE_BYTES) == 0
    for block in range(len(BLOCKS)):
        precopy(mis, block)
    assert pc.postcopy_ram_prepare_discard(mis) == 0
    for message in discard_commands(send_discards()):
        for start, length in message.ranges:
            mis.ram_discard_range(message.block, start, length)


def serve(mis: pc.MigrationIncomingState, wanted: int) -> int:
    """Answers requests until `wanted` pages were placed."""
    placed = 0
    while placed < wanted:
        request = mis.next_request(timeout=20)
        assert request is not None, f"no request after {placed} of {wanted} pages"
        place(mis, *request)
        placed += 1
    return placed


def dirty_pages(mis: pc.MigrationIncomingState) -> int:
    return sum(
        flag and mis.owns(ram.name, page * PAGE_BYTES)
        for block, ram in enumerate(BLOCKS)
        for page, flag in enumerate(dirty(block))
    )


def test_whole_migration_in_one_process_with_one_shard(unique_name):
    with pc.MigrationIncomingState.create(unique_name, BLOCKS) as mis:
        assert pc.postcopy_state_set(mis, pc.PostcopyState.ADVISE) is pc.PostcopyState.NONE
        prepare(mis)
        pc.postcopy_state_set(mis, pc.PostcopyState.DISCARD)
        guest = GuestMapping(mis)
        mis.add_guest(0, guest.addresses, guest.uffds[0].fd)
        pc.postcopy_state_set(mis, pc.PostcopyState.LISTENING)
        assert pc.postcopy_ram_enable_notify(mis) == 0
        assert pc.postcopy_state_set(mis, pc.PostcopyState.RUNNING) is pc.PostcopyState.LISTENING
        result: list = []
        vcpu = threading.Thread(target=guest.visit, args=(result,))
        vcpu.start()
        serve(mis, dirty_pages(mis))
        vcpu.join(30)
        assert result == [(ram.pages, ram.pages) for ram in BLOCKS]
        pc.postcopy_state_set(mis, pc.PostcopyState.END)
        assert pc.postcopy_ram_incoming_cleanup(mis) == 0
        assert pc.postcopy_state_get(mis) is pc.PostcopyState.END
        assert mis.memory.received_pages() == [ram.pages for ram in BLOCKS]


def shard_process(name: str, shard: int, conn) -> None:
    """The second process: the same steps for its own shard."""
    with pc.MigrationIncomingState.open(name, shard=shard) as mis:
        prepare(mis)
        conn.send("discarded")
        addresses = conn.recv()
        mis.add_guest(0, addresses, reduction.recv_handle(conn))
        assert pc.postcopy_state_get(mis) is pc.PostcopyState.LISTENING
        pc.postcopy_ram_enable_notify(mis)
        conn.send("listening")
        conn.send(serve(mis, dirty_pages(mis)))
        assert conn.recv() == "end"
        assert pc.postcopy_state_get(mis) is pc.PostcopyState.END


def expect(conn, what=None):
    assert conn.poll(30), f"the other process said nothing, expected {what}"
    answer = conn.recv()
    assert what is None or answer == what
    return answer


def test_whole_migration_in_two_processes_with_two_shards(unique_name):
    spawn = multiprocessing.get_context("spawn")
    with pc.MigrationIncomingState.create(unique_name, BLOCKS, shards=2) as mis:
        conn, theirs = spawn.Pipe()
        other = spawn.Process(target=shard_process, args=(unique_name, 1, theirs))
        other.start()
        theirs.close()
        try:
            prepare(mis)
            expect(conn, "discarded")
            pc.postcopy_state_set(mis, pc.PostcopyState.LISTENING)
            guest = GuestMapping(mis)
            mis.add_guest(0, guest.addresses, guest.uffds[0].fd)
            conn.send(guest.addresses)
            reduction.send_handle(conn, guest.uffds[1].fd, other.pid)
            pc.postcopy_ram_enable_notify(mis)
            expect(conn, "listening")
            result: list = []
            vcpu = threading.Thread(target=guest.visit, args=(result,))
            vcpu.start()
            mine = serve(mis, dirty_pages(mis))
            theirs_placed = expect(conn)
            vcpu.join(30)
            assert result == [(ram.pages, ram.pages) for ram in BLOCKS]
            assert mine > 0 and theirs_placed > 0
            pc.postcopy_state_set(mis, pc.PostcopyState.END)
            conn.send("end")
            other.join(30)
            assert other.exitcode == 0
        finally:
            other.kill()
            other.join()
            conn.close()


def test_discard_sender_splits_at_twelve_and_leaves_nothing_queued():
    sent: list[bytes] = []
    ms = pc.MigrationState(sent.append)
    pds = pc.postcopy_discard_send_init(ms, "pc.ram")
    for i in range(25):
        pc.postcopy_discard_send_range(ms, pds, 2 * i, 1)
        assert len(sent) == (i + 1) // 12
    pc.postcopy_discard_send_finish(ms, pds)
    messages = discard_commands(b"".join(sent))
    assert [len(m.ranges) for m in messages] == [12, 12, 1]
    ranges = [r for m in messages for r in m.ranges]
    assert ranges == [(2 * i * PAGE_BYTES, PAGE_BYTES) for i in range(25)]
    with pytest.raises(LocalProtocolError, match="after finish"):
        pc.postcopy_discard_send_range(ms, pds, 0, 1)


def test_finish_without_ranges_sends_nothing():
    sent: list[bytes] = []
    ms = pc.MigrationState(sent.append)
    pc.postcopy_discard_send_finish(ms, pc.postcopy_discard_send_init(ms, "pc.ram"))
    assert sent == []


def content(mis: pc.MigrationIncomingState, page: int) -> bytes:
    return os.pread(mis.memory.blocks[0].fd, PAGE_BYTES, page * PAGE_BYTES)


def test_a_second_arrival_changes_nothing(unique_name):
    """Invariant 2: between two discards of it a page is placed once."""
    with pc.MigrationIncomingState.create(unique_name, BLOCKS[:1]) as mis:
        pc.postcopy_ram_incoming_init(mis, mis.geometry.total // PAGE_BYTES)
        host = mis.host("pc.ram", 0)
        pc.postcopy_place_page(mis, host, b"a" * PAGE_BYTES, "pc.ram")
        pc.postcopy_place_page(mis, host, b"b" * PAGE_BYTES, "pc.ram")
        pc.postcopy_place_page_zero(mis, host, "pc.ram")
        assert content(mis, 0) == b"a" * PAGE_BYTES
        mis.ram_discard_range("pc.ram", 0, PAGE_BYTES)
        pc.postcopy_place_page(mis, host, b"b" * PAGE_BYTES, "pc.ram")
        assert content(mis, 0) == b"b" * PAGE_BYTES
        # A zero page stays zero, hole or not, when data comes a second time.
        pc.postcopy_place_page_zero(mis, host + PAGE_BYTES, "pc.ram")
        pc.postcopy_place_page(mis, host + PAGE_BYTES, b"c" * PAGE_BYTES, "pc.ram")
        assert content(mis, 1) == bytes(PAGE_BYTES)


def test_misuse_is_named(unique_name):
    with pc.MigrationIncomingState.create(unique_name, BLOCKS[:1]) as mis:
        with pytest.raises(LocalProtocolError, match="incoming_init"):
            pc.postcopy_get_tmp_page(mis)
        with pytest.raises(LocalProtocolError, match="RAM of 7 pages, but its blocks have 1280"):
            pc.postcopy_ram_incoming_init(mis, 7)
        pc.postcopy_ram_incoming_init(mis, mis.geometry.total // PAGE_BYTES)
        for start, length in ((5, PAGE_BYTES), (0, 100), (5 << 20, PAGE_BYTES), (-4096, 4096)):
            with pytest.raises(LocalProtocolError, match=r"not whole pages of block 'pc.ram'"):
                mis.ram_discard_range("pc.ram", start, length)
        for use in (
            lambda: mis.ram_discard_range("none", 0, PAGE_BYTES),
            lambda: mis.host("none", 0),
            lambda: mis.owns("none", 0),
            lambda: pc.postcopy_place_page_zero(mis, 0, "none"),
        ):
            with pytest.raises(LocalProtocolError, match=r"unknown block 'none'; there are"):
                use()
        with pytest.raises(LocalProtocolError, match="already"):
            pc.postcopy_ram_incoming_init(mis, mis.geometry.total // PAGE_BYTES)
        with pytest.raises(LocalProtocolError, match="no page of block"):
            pc.postcopy_place_page_zero(mis, mis.host("pc.ram", 5 << 20), "pc.ram")
        with pytest.raises(LocalProtocolError, match="expected 4096"):
            pc.postcopy_place_page(mis, mis.host("pc.ram", 0), b"short", "pc.ram")


def test_cleanup_after_init_only(unique_name):
    with pc.MigrationIncomingState.create(unique_name, BLOCKS) as mis:
        pc.postcopy_ram_incoming_init(mis, mis.geometry.total // PAGE_BYTES)
        pc.postcopy_ram_incoming_cleanup(mis)
        assert pc.postcopy_ram_incoming_cleanup(mis) == 0
