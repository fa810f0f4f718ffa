"""Synthetic pages and a guest that checks them (oracle.h)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from sharded_pc.native.core import ffi, lib

PAGE_BYTES: int = lib.SP_PAGE_BYTES
KEEP: int = lib.SP_KEEP


def fill(seed: int, block: int, page: int, version: int) -> bytes:
    """The 4096 bytes of a page."""
    out = ffi.new("uint8_t[]", PAGE_BYTES)
    lib.sp_oracle_fill(out, seed, block, page, version)
    return bytes(ffi.buffer(out))


def check(data, seed: int, block: int, page: int, version: int) -> int:
    """Offset of the first wrong word, or -1."""
    return lib.sp_oracle_check(ffi.from_buffer(data), seed, block, page, version)


def visit(
    memory,
    seed: int,
    block: int,
    pages: array,
    expected: bytes,
    write: bytes | None = None,
    *,
    latencies: bool = False,
) -> tuple[int, array]:
    """Touches, checks and perhaps rewrites `pages` (array 'Q') of a mapped block without the GIL.

    `expected` and `write` hold a version per page of the block.  Returns how many pages were right
    (all, or the position of the first wrong one) and the nanoseconds each first touch took.
    """
    times = array("Q", bytes(8 * len(pages))) if latencies else array("Q")
    right = lib.sp_guest_visit(
        ffi.from_buffer("uint8_t[]", memory, require_writable=write is not None),
        seed,
        block,
        ffi.from_buffer("uint64_t[]", pages),
        len(pages),
        ffi.from_buffer("uint8_t[]", expected),
        ffi.NULL if write is None else ffi.from_buffer("uint8_t[]", write),
        ffi.from_buffer("uint64_t[]", times) if latencies else ffi.NULL,
    )
    return right, times


def records(
    name: str, seed: int, block: int, pages: Sequence[int], versions: bytes, *, go_on: bool
) -> bytes:
    """RAM records for pages of a block in QEMU's format; version 0 gives zero pages."""
    raw_name = name.encode("utf-8", "surrogateescape")
    numbers = pages if isinstance(pages, array) else array("Q", pages)
    out = ffi.new("uint8_t[]", len(numbers) * (9 + PAGE_BYTES) + 256)
    size = lib.sp_oracle_records(
        out,
        raw_name,
        go_on,
        seed,
        block,
        ffi.from_buffer("uint64_t[]", numbers),
        len(numbers),
        ffi.from_buffer("uint8_t[]", versions),
    )
    return bytes(ffi.buffer(out, size))
