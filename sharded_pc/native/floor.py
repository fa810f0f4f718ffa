"""Bare loops and feeders of the benchmarks (floor.h).  Times are nanoseconds, measured in C."""

from __future__ import annotations

import dataclasses
import enum
from array import array

from sharded_pc.errors import ShardedPcError, ShardError
from sharded_pc.native.control import POOL_BYTES_PER_SHARD, Bitmap, Control
from sharded_pc.native.core import ensure, ffi, lib
from sharded_pc.native.guests import Guests
from sharded_pc.native.ram import Stop, Stopped
from sharded_pc.native.uffd import Uffd

PAGE_BYTES: int = lib.SP_PAGE_BYTES
MAX_BATCH = 64
"""Most pages of a descriptor and of one UFFDIO_COPY (SP_GUESS)."""


class Kind(enum.IntEnum):
    """What a feeder hands to the workers: SP_DESC_*."""

    PAGES = lib.SP_DESC_PAGES
    ZERO = lib.SP_DESC_ZERO
    DISCARD = lib.SP_DESC_DISCARD


class WrongByte(ShardedPcError):
    """A toucher read what was not placed there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Touched:
    """How long all took, and each of the pages in the order given; nanoseconds."""

    ns: int
    latencies: array


class _Touching:
    """The out-parameters of a call that touches `pages` (array 'Q')."""

    def __init__(self, pages: array) -> None:
        self._latencies = array("Q", bytes(8 * len(pages)))
        self._wrong, self._ns = ffi.new("size_t *"), ffi.new("uint64_t *")
        self.order = (ffi.from_buffer("uint64_t[]", pages), len(pages))
        self.out = (ffi.from_buffer("uint64_t[]", self._latencies), self._wrong, self._ns)

    def result(self, rc: int) -> Touched:
        """HostError, WrongByte."""
        ensure(rc, "touch pages")
        if self._wrong[0]:
            raise WrongByte(f"{self._wrong[0]} pages did not read as they were placed")
        return Touched(self._ns[0], self._latencies)


def touch(memory, pages: array, threads: int, expected: int) -> Touched:
    """Reads one byte of each page once, in the given order, with `threads` threads."""
    call, base = _Touching(pages), ffi.from_buffer("uint8_t[]", memory)
    return call.result(lib.sp_touch_pages(base, *call.order, threads, expected, *call.out))


class BareLoop:
    """One process and one registered mapping.  `memory` (writable, shared) holds holes before every
    call; `pool` are the bytes to place, as large as a shard's tmp pages.  Both outlive this."""

    def __init__(self, memory, pool, uffd: Uffd) -> None:
        assert len(pool) == POOL_BYTES_PER_SHARD
        self._keep = uffd
        self._memory = ffi.from_buffer("uint8_t[]", memory, require_writable=True)
        self._pool = ffi.from_buffer("uint8_t[]", pool)
        uffd.register(int(ffi.cast("uintptr_t", self._memory)), len(memory))
        pages = len(memory) // PAGE_BYTES
        self.raw = ffi.new("sp_floor *", (uffd.fd, self._memory, pages, self._pool))

    def release(self) -> None:
        """Lets go of the mappings, so that they can be closed."""
        ffi.release(self._memory)
        ffi.release(self._pool)

    def place(self, stripe_pages: int, batch: int) -> int:
        """Fills all holes with `batch` pages per UFFDIO_COPY; nanoseconds."""
        ns = ffi.new("uint64_t *")
        ensure(lib.sp_floor_place(self.raw, stripe_pages, batch, ns), "place pages")
        return ns[0]

    def stream(self, sock: int, first_header: int) -> int:
        """Receives a RAM stream of all pages in order and places it; nanoseconds."""
        ns = ffi.new("uint64_t *")
        rc = lib.sp_floor_stream(self.raw, sock, first_header, ns)
        ensure(rc, "receive and place pages")
        return ns[0]

    def faults(self, pages: array, threads: int, *, zero: bool) -> Touched:
        """As touch(), one handler thread beside them answering with a copy or, if `zero`, zeros."""
        call = _Touching(pages)
        return call.result(lib.sp_floor_faults(self.raw, *call.order, threads, zero, *call.out))


def feed_block(control: Control, block: int, kind: Kind, batch: int, stop: Stop) -> int:
    """Hands a whole block to its workers; returns when all is done, with the nanoseconds it took.
    ShardError, Stopped."""
    ns = ffi.new("uint64_t *")
    _check(lib.sp_feed_block(control.raw, block, kind, batch, stop.word, ns))
    return ns[0]


def feed_requests(guests: Guests, received: Bitmap, pool, stop: Stop) -> None:
    """Answers every page request at once until `stop` is set: with a tmp page of `pool` as it is,
    or with what stands in the block (`continue`).  ShardError."""
    view = ffi.from_buffer("uint8_t[]", pool)
    service = ffi.new("sp_service *", (guests.raw, received.raw, view, stop.word))
    try:
        _check(lib.sp_feed_requests(service))
    except Stopped:
        return
    finally:
        ffi.release(view)


def _check(status: int) -> None:
    if status == lib.SP_STOPPED:
        raise Stopped("stopped")
    if status == lib.SP_SHARD_FAILED:
        raise ShardError("a worker could not place what the benchmark fed it")
