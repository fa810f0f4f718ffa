"""The contract of QEMU's migration/postcopy-ram.h, name by name.

Thin over the modules that do the work; the order is the header's.  What takes a
MigrationIncomingState in QEMU takes one here; QEMU's process-wide postcopy state is the one in the
control segment of that state's memory.  Integers returned are 0 for success, as in the header;
errors are exceptions (HostError, ShardError, LocalProtocolError).

One process holds one shard: two shards are two processes, each with its own
MigrationIncomingState on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sharded_pc import host
from sharded_pc.errors import LocalProtocolError
from sharded_pc.geometry import PAGE_BYTES, Geometry, RamBlock
from sharded_pc.memory import GuestMemory
from sharded_pc.native.control import take_request
from sharded_pc.state import PostcopyState
from sharded_pc.wire.discards import DiscardSender
from sharded_pc.worker import ShardWorker

__all__ = [
    "MigrationIncomingState",
    "MigrationState",
    "PostcopyDiscardState",
    "PostcopyState",
    "postcopy_discard_send_finish",
    "postcopy_discard_send_init",
    "postcopy_discard_send_range",
    "postcopy_get_tmp_page",
    "postcopy_place_page",
    "postcopy_place_page_zero",
    "postcopy_ram_enable_notify",
    "postcopy_ram_incoming_cleanup",
    "postcopy_ram_incoming_init",
    "postcopy_ram_prepare_discard",
    "postcopy_ram_supported_by_host",
    "postcopy_state_get",
    "postcopy_state_set",
]


class MigrationIncomingState:
    """The destination's side in one process: a guest's memory and the shard this process places.

    `create` makes the memory (the first process), `open` joins it (every other one).
    """

    def __init__(self, memory: GuestMemory, shard: int, *, owner: bool) -> None:
        self.memory = memory
        self.shard = shard
        self._owner = owner
        self.worker: ShardWorker | None = None
        self.unsupported: list[str] = []
        """After postcopy_ram_supported_by_host: what is missing, with remedies."""

    @classmethod
    def create(
        cls, name: str, blocks: Sequence[RamBlock], *, shards: int = 1, shard: int = 0
    ) -> MigrationIncomingState:
        """New memory called `name`, dealt to `shards` shards; HostError, UsageError."""
        memory = GuestMemory.create(name, shards)
        geometry = Geometry.of(blocks, shards)
        try:
            host.require_memory(geometry.total)
            memory.define(geometry)
        except BaseException:
            memory.unlink()
            memory.close()
            raise
        return cls(memory, shard, owner=True)

    @classmethod
    def open(cls, name: str, *, shard: int) -> MigrationIncomingState:
        """The memory that another process created; FileNotFoundError."""
        return cls(GuestMemory.open(name), shard, owner=False)

    @property
    def geometry(self) -> Geometry:
        assert self.memory.geometry is not None
        return self.memory.geometry

    def host(self, rb: str, offset: int) -> int:
        """QEMU's `host` pointer: the address of a block's byte in this process's mapping."""
        return self._started().shard.address(self._index(rb)) + offset

    def _index(self, rb: str) -> int:
        """LocalProtocolError if there is no such block."""
        try:
            return self.geometry.index(rb)
        except KeyError:
            known = ", ".join(repr(block.name) for block in self.geometry.blocks)
            raise LocalProtocolError(f"unknown block {rb!r}; there are {known}") from None

    def owns(self, rb: str, offset: int) -> bool:
        """This process's shard places the page."""
        self._index(rb)
        return self.geometry.shard_of(rb, offset // PAGE_BYTES) == self.shard

    def ram_discard_range(self, rb: str, start: int, length: int) -> int:
        """What a received discard asks for (QEMU migration/ram.c): drops the pages of [start,
        start + length) that are this shard's; the other shards drop theirs.  LocalProtocolError
        unless that is whole pages of the block."""
        index, shard = self._index(rb), self._started().shard
        size = self.geometry.block(rb).size
        if start % PAGE_BYTES or length % PAGE_BYTES or not 0 <= start <= start + length <= size:
            raise LocalProtocolError(
                f"discard of {length:#x} bytes at {start:#x} is not whole pages of block {rb!r} of "
                f"{size:#x} bytes"
            )
        for extent in self.geometry.extents():
            first = max(extent.offset, start)
            end = min(extent.offset + extent.size, start + length)
            if extent.block == rb and extent.shard == self.shard and first < end:
                shard.discard(index, first // PAGE_BYTES, (end - first) // PAGE_BYTES)
        return 0

    def add_guest(self, slot: int, addresses: Sequence[int], uffd: int) -> None:
        """A guest that registered this shard's stripes with `uffd` (MISSING); AttachError."""
        self._started().add_guest(slot, addresses, 1, uffd)

    def next_request(self, timeout: float) -> tuple[str, int] | None:
        """The next page (block, offset) that a guest waits for and the source must send, or None
        after `timeout` seconds."""
        found = take_request(self.memory.control, self.shard, timeout)
        return (
            None if found is None else (self.geometry.blocks[found[0]].name, found[1] * PAGE_BYTES)
        )

    def _started(self) -> ShardWorker:
        if self.worker is None:
            raise LocalProtocolError("postcopy_ram_incoming_init has not been called")
        return self.worker

    def page(self, host_address: int, rb: str) -> tuple[int, int]:
        """(block index, page) of a host address; LocalProtocolError if it is not a page of `rb`
        that this shard places."""
        index = self._index(rb)
        offset = host_address - self.host(rb, 0)
        size = self.geometry.block(rb).size
        if offset % PAGE_BYTES or not 0 <= offset < size or not self.owns(rb, offset):
            raise LocalProtocolError(
                f"host address {host_address:#x} is no page of block {rb!r} in shard {self.shard}"
            )
        return index, offset // PAGE_BYTES

    def close(self) -> None:
        """Forgets the memory; the process that created it removes it."""
        postcopy_ram_incoming_cleanup(self)
        if self._owner:
            self.memory.unlink()
        self.memory.close()

    def __enter__(self) -> MigrationIncomingState:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class MigrationState:
    """The source's side: `send(bytes)` puts a message into the stream."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self.send = send


PostcopyDiscardState = DiscardSender
"""Discards of one RAMBlock, between init and finish."""


def postcopy_ram_supported_by_host(mis: MigrationIncomingState) -> bool:
    """True if this host has everything postcopy needs; else `mis.unsupported` says what is
    missing."""
    needed = [f for f in host.findings() if f.required and not f.ok]
    mis.unsupported = [f"{f.name}: {f.detail}; {f.remedy}" for f in needed]
    return not mis.unsupported


def postcopy_ram_enable_notify(mis: MigrationIncomingState) -> int:
    """Makes all RAM sensitive to accesses, so that any part that has not been written yet asks the
    source for it: faults of guests are answered from now on.  Discards must be complete."""
    mis._started().listen()
    return 0


def postcopy_ram_incoming_init(mis: MigrationIncomingState, ram_pages: int) -> int:
    """Called before any precopy data: leaves all of this shard's RAM discarded, ready for postcopy
    at any later time.  `ram_pages` is how many pages the caller takes the RAM to have, all blocks
    together.  HostError; LocalProtocolError if it is not what the memory was made for."""
    expected = mis.geometry.total // PAGE_BYTES
    if ram_pages != expected:
        raise LocalProtocolError(f"RAM of {ram_pages} pages, but its blocks have {expected}")
    if mis.worker is not None:
        raise LocalProtocolError("postcopy_ram_incoming_init was called already")
    mis.worker = ShardWorker(mis.memory, mis.shard)
    mis.worker.geometry()
    for block in mis.geometry.blocks:
        mis.ram_discard_range(block.name, 0, block.size)
    return 0


def postcopy_ram_incoming_cleanup(mis: MigrationIncomingState) -> int:
    """Called at the end of any migration that incoming_init was called for, whatever happened
    since.  Guests of a migration that has arrived (state END) run on plain memory afterwards;
    guests of any other keep waiting."""
    worker, mis.worker = mis.worker, None
    if worker is not None:
        worker.stop(release=postcopy_state_get(mis) is PostcopyState.END)
        worker.close()
    return 0


def postcopy_ram_prepare_discard(mis: MigrationIncomingState) -> int:
    """Called before the first discard and not earlier, so that precopied data can be huge: makes
    the RAM no-hugepage, so that a discard really unmaps."""
    mis._started().prepare()
    return 0


def postcopy_discard_send_init(ms: MigrationState, name: str) -> PostcopyDiscardState:
    """Called at the start of each RAMBlock by the bitmap code; `name` is the block's."""
    return PostcopyDiscardState(ms.send, name)


def postcopy_discard_send_range(
    ms: MigrationState, pds: PostcopyDiscardState, start: int, length: int
) -> None:
    """Called by the bitmap code for each chunk to discard: `start` and `length` in pages.  May
    send a message or queue it; complete only after postcopy_discard_send_finish."""
    pds.range(start, length)


def postcopy_discard_send_finish(ms: MigrationState, pds: PostcopyDiscardState) -> None:
    """Called at the end of each RAMBlock by the bitmap code: sends whatever is queued."""
    pds.finish()


def postcopy_place_page(
    mis: MigrationIncomingState, host: int, from_: memoryview | bytes, rb: str
) -> int:
    """Places a page (`from_`) at `host` atomically; 0 on success.  `from_` must come from
    postcopy_get_tmp_page or be mapped alike, and be one page long.  A page that is already there
    is left as it is.  LocalProtocolError, ShardError."""
    if len(from_) != PAGE_BYTES:
        raise LocalProtocolError(f"a page of {len(from_)} bytes, expected {PAGE_BYTES}")
    index, page = mis.page(host, rb)
    mis._started().shard.place(index, page, 1, from_)
    return 0


def postcopy_place_page_zero(mis: MigrationIncomingState, host: int, rb: str) -> int:
    """Places a zero page at `host` atomically; 0 on success."""
    index, page = mis.page(host, rb)
    mis._started().shard.place_zero(index, page, 1)
    return 0


def postcopy_get_tmp_page(mis: MigrationIncomingState) -> memoryview:
    """A page that can be used as `from_` of postcopy_place_page; the same one every time."""
    return mis._started().pool[:PAGE_BYTES]


def postcopy_state_get(mis: MigrationIncomingState) -> PostcopyState:
    """The state, read atomically."""
    return mis.memory.control.postcopy_state


def postcopy_state_set(mis: MigrationIncomingState, new_state: PostcopyState) -> PostcopyState:
    """Sets the state atomically and returns the old one."""
    return mis.memory.control.exchange_postcopy_state(new_state)
