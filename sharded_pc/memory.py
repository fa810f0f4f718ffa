"""A guest's RAM in shared memory, with the control segment around it.

The coordinator creates it, workers and onlookers open it.  Its geometry is known only when the
source has sent its block list: `define` makes blocks and bitmaps then, `load` finds them.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import time
from collections.abc import Iterator, Sequence

from sharded_pc import shm
from sharded_pc.backend_segments import BackendSegments
from sharded_pc.errors import HostError, UsageError
from sharded_pc.geometry import Geometry, Placement
from sharded_pc.native.control import (
    MAX_SHARDS,
    POOL_BYTES_PER_SHARD,
    Bitmap,
    Control,
    control_bytes,
)
from sharded_pc.shm import Segment
from sharded_pc.state import MigrationStatus

BITMAP_COUNT = 3
"""received, requested, written"""


class GuestMemory:
    """Segments of one receiver.  `blocks` is in the stream's order, empty until the geometry is
    known; the same index names a block in the control segment."""

    def __init__(self, name: str, control: Segment, pool: Segment) -> None:
        self.name = name
        self._control_segment = control
        self.pool = pool
        self.control = Control(control.map)
        self.geometry: Geometry | None = None
        self.blocks: list[Segment] = []
        self.backends: BackendSegments | None = None
        """of a destination that is up before the geometry is known"""
        self._bitmap_segment: Segment | None = None
        self.received: Bitmap
        self.requested: Bitmap
        self.written: Bitmap
        """`continue`: pages that may hold anything but zeros, received or not; `copy`: pages that a
        discard's punch left in place"""

    @classmethod
    def create(cls, name: str, shards: int) -> GuestMemory:
        """A new receiver's memory, without blocks yet; HostError, UsageError."""
        shm.check_name(name)
        if not 1 <= shards <= MAX_SHARDS:
            raise UsageError(f"{shards} workers: expected 1 to {MAX_SHARDS}")
        control = Segment.create_owned(f"/{name}{shm.CONTROL}", control_bytes(shards))
        try:
            pool_bytes = shards * POOL_BYTES_PER_SHARD
            pool = Segment.create(f"/{name}{shm.POOL}", pool_bytes, reserve=True)
        except BaseException:
            control.unlink()
            control.close()
            raise
        memory = cls(name, control, pool)
        memory.control.init(shards, os.getpid())
        return memory

    @classmethod
    def open(cls, name: str) -> GuestMemory:
        """An existing receiver's memory, geometry included if it is known.
        FileNotFoundError; HostError if it is of another version."""
        control = Segment.open(f"/{name}{shm.CONTROL}")
        memory = cls(name, control, Segment.open(f"/{name}{shm.POOL}"))
        if not memory.control.is_valid():
            raise HostError(
                f"shared memory {control.name} is not a control segment of this version"
            )
        memory.load()
        return memory

    @classmethod
    def adopt(cls, name: str) -> GuestMemory:
        """A dead receiver's memory, with the owner's lock.  FileNotFoundError; HostError if its
        owner lives, or it is of another version."""
        memory = cls.open(name)
        try:
            memory._control_segment.own(time.monotonic() + shm.LOCK_SECONDS)
            if not memory._control_segment.is_named():
                raise FileNotFoundError(errno.ENOENT, "removed meanwhile", name)
        except BaseException:
            memory.close()
            raise
        return memory

    @property
    def placement(self) -> Placement | None:
        """None until the geometry is known."""
        return self.control.placement

    @staticmethod
    def geometry_of(control: Segment) -> Geometry | None:
        """The geometry of RAM that has arrived, by its control segment alone; None if it has not
        or its owner lives; HostError if the segment is of another version."""
        look = Control(control.map)
        try:
            if not look.is_valid():
                raise HostError(f"{control.name} is not a control segment of this version")
            arrived = look.status is MigrationStatus.COMPLETED and control.lock(shared=True)
            return look.geometry if arrived else None
        finally:
            look.release()

    def define(
        self,
        geometry: Geometry,
        placement: Placement = Placement.COPY,
        reason: str = "as asked",
        *,
        reserve: bool = False,
        first: Sequence[Segment] = (),
    ) -> None:
        """Makes the blocks and bitmaps; HostError.  On failure nothing of it stays.  `reason`: why
        this placement, at most 159 bytes.  `reserve`: allocates the blocks now (`continue`: with
        `copy` nobody would wait for what is there).  `first`: segments that the first blocks have
        already, ours from now on."""
        assert self.geometry is None
        made = list(first)
        try:
            for block in geometry.blocks[len(first) :]:
                name = shm.block_segment_name(self.name, block.name)
                made.append(Segment.create(name, block.size, reserve=reserve))
            bits = sum(-(-block.pages // 64) * 64 for block in geometry.blocks)
            size = bits // 8 * BITMAP_COUNT
            made.append(Segment.create(f"/{self.name}{shm.BITMAPS}", size, reserve=True))
            self.control.publish(geometry, placement, reason)
        except BaseException:
            for segment in made:
                segment.unlink()
                segment.close()
            raise
        *self.blocks, bitmaps = made
        self._use(geometry, bitmaps)

    def load(self) -> None:
        """Opens what `define` made, if it did."""
        geometry = self.control.geometry
        if geometry is None or self.geometry is not None:
            return
        names = [shm.block_segment_name(self.name, block.name) for block in geometry.blocks]
        self.blocks = [Segment.open(name) for name in names]
        self._use(geometry, Segment.open(f"/{self.name}{shm.BITMAPS}"))

    def _use(self, geometry: Geometry, bitmaps: Segment) -> None:
        size = bitmaps.size // BITMAP_COUNT
        assert size * 8 == self.control.n_bits
        self._bitmap_segment = bitmaps
        self.received, self.requested, self.written = (
            Bitmap(bitmaps.map, number * size, size) for number in range(BITMAP_COUNT)
        )
        self.geometry = geometry

    def received_pages(self) -> list[int]:
        """Pages received, for each block."""
        counts = []
        for index, segment in enumerate(self.blocks):
            first = self.control.block(index)[2]
            counts.append(self.received.count(first, segment.size // mmap.PAGESIZE))
        return counts

    def missing_pages(self) -> int:
        """Pages that have not arrived; what still stands in rings has not."""
        assert self.geometry is not None
        return sum(block.pages for block in self.geometry.blocks) - sum(self.received_pages())

    def missing(self, index: int) -> Iterator[tuple[int, int]]:
        """(first page, pages) of each stretch of a block that is not received."""
        yield from self._stretches(self.received, index, of=False)

    def missing_stretches(self, most: int) -> dict[str, list[tuple[int, int]]]:
        """(first page, pages) of the first `most` stretches that are not received, for each block
        that has some."""
        found: dict[str, list[tuple[int, int]]] = {}
        for index in range(len(self.blocks)):
            stretches = list(itertools.islice(self.missing(index), most))
            most -= len(stretches)
            if stretches:
                found[self.geometry.blocks[index].name] = stretches
        return found

    def unpunched(self, index: int) -> Iterator[tuple[int, int]]:
        """(first page, pages) of what a discard's punch left in place: whoever maps it would see it
        instead of waiting (`copy`)."""
        yield from self._stretches(self.written, index, of=True)

    def _stretches(self, bits: Bitmap, index: int, *, of: bool) -> Iterator[tuple[int, int]]:
        _, size, first, *_ = self.control.block(index)
        page, pages = 0, size // mmap.PAGESIZE
        while page < pages:
            run = bits.run(first + page, pages - page)
            if bits.test(first + page) == of:
                yield page, run
            page += run

    def unlink(self) -> None:
        """Removes all names; mappings live on."""
        if self.backends is not None:
            self.backends.unlink()
        for segment in (*self.blocks, self._bitmap_segment, self.pool, self._control_segment):
            if segment is not None:
                segment.unlink()

    def unlink_all_but_ram(self) -> None:
        """What `--keep` leaves is the RAM and the control segment that describes it."""
        for segment in (self._bitmap_segment, self.pool):
            if segment is not None:
                segment.unlink()

    def close(self) -> None:
        """Closes descriptors and mappings; the C objects that use them must be released before."""
        self.control.release()
        if self._bitmap_segment is not None:
            self.received.release()
            self.requested.release()
            self.written.release()
            self._bitmap_segment.close()
        if self.backends is not None:
            self.backends.close()
        for segment in (*self.blocks, self.pool, self._control_segment):
            with contextlib.suppress(BufferError):
                segment.close()
