"""The control segment and the bitmaps (control.h, view.h) as Python sees them."""

from __future__ import annotations

import dataclasses
import time

from sharded_pc.geometry import Geometry, Placement, RamBlock
from sharded_pc.native.core import ensure, ffi, lib
from sharded_pc.state import MigrationStatus, PostcopyState

MAX_SHARDS: int = lib.SP_MAX_SHARDS
MAX_GUESTS: int = lib.SP_MAX_GUESTS
POOL_BYTES_PER_SHARD: int = lib.SP_POOL_SLOTS * lib.SP_PAGE_BYTES


_PLACEMENTS = (None, Placement.COPY, Placement.CONTINUE)
assert (lib.SP_PLACE_COPY, lib.SP_PLACE_CONTINUE) == (1, 2)


def control_bytes(shards: int) -> int:
    """Size of a control segment."""
    return lib.sp_control_bytes(shards)


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """Coordinator's counters (sp_totals); times are CLOCK_MONOTONIC nanoseconds, 0: not yet."""

    transferred: int
    normal: int
    duplicate: int
    requests_sent: int
    discarded: int
    spills: int
    preempt_bytes: int
    preempt_pages: int
    started_ns: int
    setup_ns: int
    stopped_ns: int
    running_ns: int
    ended_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class ShardCounters:
    """One worker's counters (sp_counters); latency is a list of bucket counts."""

    pages: int
    zero_pages: int
    second_pages: int
    copies: int
    mapped: int
    urgent: int
    wakes: int
    discarded: int
    unpunched: int
    faults: int
    requests: int
    late_faults: int
    lost_samples: int
    latency_ns: int
    latency: tuple[int, ...]
    queued: int
    discards_sent: int
    discards_done: int
    beats: int
    failed: int
    pid: int
    restarts: int


def _fields(cls, raw) -> dict:
    return {f.name: getattr(raw, f.name) for f in dataclasses.fields(cls)}


def _block_name(raw) -> str:
    return ffi.string(raw.name).decode("utf-8", "surrogateescape")


class Control:
    """A mapped control segment.  `buffer` is its writable mapping and must outlive this object."""

    def __init__(self, buffer) -> None:
        self._buffer = ffi.from_buffer(buffer, require_writable=True)
        self.raw = ffi.cast("sp_control *", self._buffer)

    def release(self) -> None:
        """Lets go of the mapping, so that it can be closed."""
        self.raw = None
        ffi.release(self._buffer)

    def init(self, shards: int, owner: int) -> None:
        lib.sp_control_init(self.raw, shards, owner)

    def is_valid(self) -> bool:
        return lib.sp_control_check(self.raw, len(self._buffer)) == 0

    def publish(
        self, geometry: Geometry, placement: Placement = Placement.COPY, reason: str = "as asked"
    ) -> None:
        lib.sp_control_set_placement(self.raw, _PLACEMENTS.index(placement), reason.encode())
        for index, block in enumerate(geometry.blocks):
            name = block.name.encode("utf-8", "surrogateescape")
            rc = lib.sp_control_add_block(self.raw, index, name, block.size)
            ensure(rc, f"add block {block.name!r} of {block.size:#x} bytes")
            rc = lib.sp_control_set_source_page(self.raw, index, block.source_page_size)
            ensure(rc, f"add block {block.name!r} with pages of {block.source_page_size:#x} bytes")
        rc = lib.sp_control_publish(self.raw, len(geometry.blocks), geometry.stripe_pages)
        ensure(rc, "publish the RAM geometry")

    @property
    def view(self):
        view = ffi.new("sp_control_view *")
        lib.sp_view_control(self.raw, view)
        return view

    @property
    def n_bits(self) -> int:
        return self.view.n_bits

    @property
    def geometry(self) -> Geometry | None:
        """None until the block list was read."""
        view = self.view
        if not view.n_blocks:
            return None
        blocks = map(self._ram_block, range(view.n_blocks))
        return Geometry(tuple(blocks), view.n_shards, view.stripe_pages * lib.SP_PAGE_BYTES)

    @property
    def placement(self) -> Placement | None:
        """None until the block list was read."""
        return _PLACEMENTS[self.view.placement]

    @property
    def placement_reason(self) -> str:
        return ffi.string(self.view.placement_reason).decode()

    def block(self, index: int) -> tuple[str, int, int]:
        """(name, bytes, first bit in the bitmaps)."""
        raw = self._block_view(index)
        return _block_name(raw), raw.bytes, raw.first_bit

    def _block_view(self, index: int):
        raw = ffi.new("sp_block_view *")
        ensure(lib.sp_view_block(self.raw, index, raw), f"look up block {index}")
        return raw

    def _ram_block(self, index: int) -> RamBlock:
        raw = self._block_view(index)
        return RamBlock(_block_name(raw), raw.bytes, source_page_size=raw.source_page)

    @property
    def postcopy_state(self) -> PostcopyState:
        return PostcopyState(lib.sp_state_get(self.raw))

    def exchange_postcopy_state(self, new: PostcopyState) -> PostcopyState:
        """Sets the state atomically and returns the old one."""
        return PostcopyState(lib.sp_state_set(self.raw, new))

    @property
    def status(self) -> MigrationStatus:
        return MigrationStatus.numbered(self.view.status)

    @status.setter
    def status(self, status: MigrationStatus) -> None:
        lib.sp_status_set(self.raw, status.number)

    @property
    def totals(self) -> Totals:
        raw = ffi.new("sp_totals_view *")
        lib.sp_view_totals(self.raw, raw)
        return Totals(**_fields(Totals, raw))

    def shard(self, index: int) -> ShardCounters:
        raw = ffi.new("sp_shard_view *")
        ensure(lib.sp_view_shard(self.raw, index, raw), f"look up shard {index}")
        fields = _fields(ShardCounters, raw)
        return ShardCounters(**{**fields, "latency": tuple(raw.latency)})

    def shards(self) -> list[ShardCounters]:
        return [self.shard(i) for i in range(self.view.n_shards)]

    def note_started(self) -> None:
        lib.sp_note_time(self.raw, lib.SP_AT_START)

    def note_setup(self) -> None:
        lib.sp_note_time(self.raw, lib.SP_AT_SETUP)

    def note_stopped(self) -> None:
        lib.sp_note_time(self.raw, lib.SP_AT_STOPPED)

    def note_running(self) -> None:
        lib.sp_note_time(self.raw, lib.SP_AT_RUNNING)

    def note_ended(self) -> None:
        lib.sp_note_time(self.raw, lib.SP_AT_ENDED)

    def note_worker(self, index: int, pid: int) -> None:
        lib.sp_note_shard(self.raw, index, pid)

    def note_back_lost(self) -> None:
        """There is no way back to the source, until a return path is armed."""
        lib.sp_note_back_lost(self.raw)

    @property
    def ram_section(self) -> int | None:
        """The number of the stream's RAM section, None before it was said."""
        return self.view.ram_section - 1 if self.view.ram_section else None

    def note_ram_section(self, number: int) -> None:
        lib.sp_note_ram_section(self.raw, number)

    @property
    def destination(self) -> tuple[int, int] | None:
        """(pid, start time in clock ticks since boot) of the QEMU whose guest runs here."""
        view = self.view
        return (view.destination, view.destination_start) if view.destination else None

    def note_destination(self, pid: int, start: int) -> None:
        lib.sp_note_destination(self.raw, pid, start)

    def take_over(self, owner: int) -> None:
        """A dead coordinator's segment, whose workers are dead too, becomes the `owner`'s."""
        lib.sp_control_take_over(self.raw, owner)

    def note_death(self, index: int) -> None:
        """A shard's worker is dead and reaped: the return path does not wait for what it was
        writing, nor anybody for what it was about to say."""
        lib.sp_note_death(self.raw, index)

    def note_restart(self, index: int) -> None:
        lib.sp_note_restart(self.raw, index)

    def note_failed(self, index: int, *, failed: bool) -> None:
        """Whether a shard's pages will be placed by nobody: the stream ends when it meets one."""
        lib.sp_note_failed(self.raw, index, failed)

    def beats(self, index: int) -> int:
        """A number that changes while the shard's placement loop goes on, at least every 0.1 s."""
        return lib.sp_shard_beats(self.raw, index)

    def nudge(self, index: int) -> None:
        """A worker that sleeps gives a sign of life."""
        lib.sp_nudge(self.raw, index)

    def note_guest(self, slot: int, pid: int) -> None:
        """The process that is attached there; 0: it has left."""
        lib.sp_note_guest(self.raw, slot, pid)

    @property
    def guest_pids(self) -> frozenset[int]:
        """Processes that are attached."""
        return frozenset(pid for pid in self.view.guests if pid)

    def note_transferred(self, total: int) -> None:
        lib.sp_add_transferred(self.raw, total)


def take_request(control: Control, shard: int, timeout: float) -> tuple[int, int] | None:
    """The oldest page that a guest of the shard asks the source for, as (block index, page); None
    after `timeout` seconds.  Only where no return-path loop runs."""
    desc = ffi.new("sp_desc *")
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        if lib.sp_take_request(control.raw, shard, max(int(left * 1000), 1), desc):
            return desc.block, desc.first_page
    return None


class Bitmap:
    """A page bitmap over a writable buffer: one bit per page, 8-byte words (bitmap.h)."""

    def __init__(self, buffer, offset: int, size: int) -> None:
        self._buffer = ffi.from_buffer(buffer, require_writable=True)
        self.raw = ffi.cast("sp_word *", self._buffer + offset)
        self.bits = size * 8

    def release(self) -> None:
        self.raw = None
        ffi.release(self._buffer)

    def _within(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.bits:
            raise IndexError(f"bits {first}..{first + count} of a bitmap of {self.bits}")

    def test(self, bit: int) -> bool:
        self._within(bit, 1)
        return bool(lib.sp_bits_test_at(self.raw, bit))

    def claim(self, bit: int) -> bool:
        """Sets the bit; true if it was this call that did."""
        self._within(bit, 1)
        return bool(lib.sp_bits_claim_at(self.raw, bit))

    def set(self, first: int, count: int) -> None:
        self._within(first, count)
        lib.sp_bits_set_at(self.raw, first, count)

    def clear(self, first: int, count: int) -> int:
        """How many were set."""
        self._within(first, count)
        return lib.sp_bits_clear_at(self.raw, first, count)

    def count(self, first: int, count: int) -> int:
        self._within(first, count)
        return lib.sp_bits_count_at(self.raw, first, count)

    def run(self, first: int, count: int) -> int:
        """How many bits from `first` on, at most `count`, equal the bit `first`."""
        self._within(first, max(count, 1))
        return lib.sp_bits_run_at(self.raw, first, count)
