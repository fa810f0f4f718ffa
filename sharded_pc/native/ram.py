"""The wire in C: buffered reading, RAM records, routing to shards (stream.h, ram.h)."""

from __future__ import annotations

import enum
import itertools
import os
from array import array
from collections.abc import Sequence

from sharded_pc.errors import ShardedPcError, ShardError
from sharded_pc.native.alias import Alias
from sharded_pc.native.control import Bitmap, Control
from sharded_pc.native.core import ensure_object, ffi, lib, system_error
from sharded_pc.native.guests import Guests
from sharded_pc.native.own_mapping import OwnMapping
from sharded_pc.wire.compressed import inflated


class Stopped(ShardedPcError):
    """The loop was asked to stop."""


class WireClosed(ShardedPcError):
    """The peer closed the wire, or it broke: `Stream.broken_by`."""


class NotYet(Exception):
    """The wire is quiet; call again (only with a timeout)."""


class Records(enum.Enum):
    """How a call of `Ram.records` ended."""

    EOS = enum.auto()
    MEM_SIZE = enum.auto()
    """the block list follows; its total is `Ram.mem_size`"""
    BAD_FLAGS = enum.auto()
    UNSUPPORTED = enum.auto()
    NO_BLOCK = enum.auto()
    EMPTY_NAME = enum.auto()
    UNKNOWN_BLOCK = enum.auto()
    OUTSIDE_BLOCK = enum.auto()
    BAD_FILL = enum.auto()
    NOT_IN_POSTCOPY = enum.auto()
    BAD_ENCODING = enum.auto()
    BAD_LENGTH = enum.auto()
    BAD_ENCODED = enum.auto()
    FLUSH = enum.auto()
    """channels of multifd synchronise here; more records follow"""


class Stop:
    """A switch that ends C loops: an eventfd for those that poll, a word for those that wait."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.word = ffi.new("uint32_t *", 0)

    def set(self) -> None:
        self.word[0] = 1
        if self.fd >= 0:
            os.eventfd_write(self.fd, 1)

    @property
    def is_set(self) -> bool:
        return bool(self.word[0])

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1


class Stream:
    """A buffered reader of a non-blocking descriptor, which stays the caller's."""

    def __init__(
        self, fd: int, stop: Stop, record_fd: int = -1, *, timeout_ms: int = -1, earlier: int = 0
    ) -> None:
        """`earlier`: bytes of connections before this one, which offsets count as well."""
        os.set_blocking(fd, False)
        self._stop = stop
        self.timeout_ms = timeout_ms
        raw = ensure_object(lib.sp_stream_new(fd, stop.fd, record_fd), "allocate a stream")
        self.raw = ffi.gc(raw, lib.sp_stream_free)
        self.raw.total = earlier

    @property
    def offset(self) -> int:
        """Bytes consumed so far."""
        return lib.sp_stream_offset(self.raw)

    @property
    def broken_by(self) -> str | None:
        """What the kernel says of a wire that broke; None if it was closed in order."""
        return os.strerror(self.raw.err) if self.raw.err else None

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes; WireClosed, Stopped, HostError."""
        self._look_at_stop()
        out, got = ffi.new("uint8_t[]", max(size, 1)), ffi.new("size_t *", 0)
        self._check(lib.sp_stream_read(self.raw, out, size, got, self.timeout_ms))
        return bytes(ffi.buffer(out, size))

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, which stay."""
        self._look_at_stop()
        out = ffi.new("uint8_t[]", size)
        self._check(lib.sp_stream_peek(self.raw, out, size, self.timeout_ms))
        return bytes(ffi.buffer(out, size))

    def some(self, most: int) -> bytes:
        """1..most bytes."""
        self._look_at_stop()
        out, got = ffi.new("uint8_t[]", most), ffi.new("size_t *", 0)
        self._check(lib.sp_stream_some(self.raw, out, most, got, self.timeout_ms))
        return bytes(ffi.buffer(out, got[0]))

    def _look_at_stop(self) -> None:
        """A wire that is never empty never polls the stop switch."""
        if self._stop.is_set:
            raise Stopped("stopped")

    def _check(self, status: int) -> None:
        raise_for(status, self.raw.err)


def raise_for(status: int, errno: int) -> None:
    """Turns the statuses that any loop can end with into errors."""
    if status == lib.SP_STOPPED:
        raise Stopped("stopped")
    if status == lib.SP_EOF:
        raise WireClosed("the source closed the stream")
    if status == lib.SP_SYS:
        raise system_error(errno, "receive the migration stream")
    if status == lib.SP_AGAIN:
        raise NotYet


class Ram:
    """Takes RAM records off a stream: into segments before LISTENING, to shards from then on.

    Buffers and the stream must outlive this object.
    """

    def __init__(
        self,
        stream: Stream,
        control: Control,
        received: Bitmap,
        requested: Bitmap,
        pool,
        stop: Stop,
    ) -> None:
        self._keep = (stream, control, received, requested, stop)
        self._pool = ffi.from_buffer(pool, require_writable=True)
        raw = lib.sp_ram_new(
            stream.raw,
            control.raw,
            received.raw,
            requested.raw,
            ffi.cast("uint8_t *", self._pool),
            stop.word,
        )
        self.raw = ffi.gc(ensure_object(raw, "allocate a RAM reader"), lib.sp_ram_free)
        self.raw.timeout_ms = stream.timeout_ms

    def release(self) -> None:
        ffi.release(self.raw)
        ffi.release(self._pool)

    def use_block(self, index: int, fd: int) -> None:
        """The segment that holds a block."""
        self.raw.block_fd[index] = fd

    def go_straight(self, written: Bitmap, aliases: Sequence[Alias]) -> None:
        """`continue`: pages are received into their blocks; before the first record."""
        self._keep = (*self._keep, written, *aliases)
        for index, alias in enumerate(aliases):
            self.raw.alias[index] = alias.raw
        lib.sp_ram_go_straight(self.raw, written.raw)

    def serve(self, guests: Guests) -> None:
        """Requested pages are made visible at once, not when the worker's turn comes."""
        self._keep = (*self._keep, guests)
        self.raw.guests = guests.raw

    def enter_postcopy(self) -> None:
        """From now on placement is atomic."""
        self.raw.postcopy = 1

    def read_preempt(self, main: Ram, own: OwnMapping | None, unpunched: Bitmap) -> None:
        """Of the channel of postcopy-preempt, beside the `main` channel's, which must outlive its
        loop; before the first record.  `own` with `copy`."""
        self._keep = (*self._keep, main, own, unpunched)
        lib.sp_ram_preempt(self.raw, main.raw)
        if own is not None:
            self.raw.own_uffd = own.uffd.fd
            self.raw.unpunched = unpunched.raw
            for index, view in enumerate(own.views):
                self.raw.own[index] = view

    def records(self) -> Records:
        """Reads records until EOS, MEM_SIZE or a bad record; WireClosed, Stopped, HostError,
        ShardError."""
        while (status := lib.sp_ram_records(self.raw)) == lib.SP_COMPRESSED:
            page = inflated(bytes(ffi.buffer(self.raw.compressed, self.encoded)))
            if page is None:
                return Records.BAD_ENCODED
            self._finish(lib.sp_ram_inflated(self.raw, page))
        raise_for(status, self.raw.err)
        self._check_shard(status)
        return _OUTCOMES[status]

    def discard(self, block: int, first_page: int, pages: int) -> None:
        """Hands a discard to every shard it touches."""
        self._finish(lib.sp_hand_discard(self.raw, block, first_page, pages))

    def discards(self, block: int, ranges: Sequence[tuple[int, int]]) -> int | None:
        """Discards (start, length) ranges of bytes in order, by one call; None, or the number of
        the first that is not whole pages of the block, with those before it discarded."""
        flat, bad = array("Q", itertools.chain.from_iterable(ranges)), ffi.new("size_t *")
        pairs = ffi.from_buffer("uint64_t[]", flat)
        status = lib.sp_hand_discards(self.raw, block, pairs, len(ranges), bad)
        if status == lib.SP_OUTSIDE_BLOCK:
            return bad[0]
        self._finish(status)
        return None

    def discards_ahead(self) -> None:
        """Takes good discard messages off the stream, as far as they stand in its buffer; one that
        is not whole or not good stays.  Only where another discard is legal."""
        self._finish(lib.sp_discards_ahead(self.raw))

    def drain(self) -> None:
        """Returns when every shard has done everything it was handed."""
        self._finish(lib.sp_hand_drain(self.raw))

    def clear_unsent(self) -> None:
        """Before guests run on what precopy brought: pages that never came read as zeros."""
        self._finish(lib.sp_straight_unsent(self.raw))

    def _finish(self, status: int) -> None:
        raise_for(status, self.raw.err)
        self._check_shard(status)

    def _check_shard(self, status: int) -> None:
        if status == lib.SP_SHARD_FAILED:
            raise ShardError(f"the worker of shard {self.raw.shard} failed")

    @property
    def mem_size(self) -> int:
        return self.raw.mem_size

    @property
    def header(self) -> int:
        """The be64 of the last record."""
        return self.raw.header

    @property
    def record_offset(self) -> int:
        """Stream offset of the last record."""
        return self.raw.at

    @property
    def fill(self) -> int:
        return self.raw.fill

    @property
    def encoded(self) -> int:
        """Bytes of the last encoded page."""
        return self.raw.encoded

    @property
    def bad_block(self) -> int:
        """Index of the block that a record left."""
        return self.raw.bad_block

    @property
    def unknown_name(self) -> str:
        raw = ffi.buffer(self.raw.name, self.raw.name_len)
        return bytes(raw).decode("utf-8", "surrogateescape")


_OUTCOMES = {
    lib.SP_EOS: Records.EOS,
    lib.SP_MEM_SIZE: Records.MEM_SIZE,
    lib.SP_BAD_FLAGS: Records.BAD_FLAGS,
    lib.SP_UNSUPPORTED: Records.UNSUPPORTED,
    lib.SP_NO_BLOCK: Records.NO_BLOCK,
    lib.SP_EMPTY_NAME: Records.EMPTY_NAME,
    lib.SP_UNKNOWN_BLOCK: Records.UNKNOWN_BLOCK,
    lib.SP_OUTSIDE_BLOCK: Records.OUTSIDE_BLOCK,
    lib.SP_BAD_FILL: Records.BAD_FILL,
    lib.SP_NOT_IN_POSTCOPY: Records.NOT_IN_POSTCOPY,
    lib.SP_BAD_ENCODING: Records.BAD_ENCODING,
    lib.SP_BAD_LENGTH: Records.BAD_LENGTH,
    lib.SP_BAD_ENCODED: Records.BAD_ENCODED,
    lib.SP_FLUSH: Records.FLUSH,
}
