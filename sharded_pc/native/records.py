"""RAM records of a block's content (records.h), and such records passed over (lab/pass.h)."""

from __future__ import annotations

from sharded_pc.native.core import ffi, lib

PAGE_BYTES: int = lib.SP_PAGE_BYTES


def block_records(name: str, first_page: int, content: bytes) -> bytes:
    """PAGE and ZERO records for whole pages of a block; the first names it."""
    pages = len(content) // PAGE_BYTES
    out = ffi.new("uint8_t[]", pages * (9 + PAGE_BYTES) + 264)
    raw = name.encode("utf-8", "surrogateescape")
    source = ffi.from_buffer("uint8_t[]", content)
    return bytes(ffi.buffer(out, lib.sp_block_records(out, raw, source, first_page, pages)))


class Passed:
    """Pages of one kind in one block: how many, in how many stretches of neighbours, the offsets of
    the first and the last that came."""

    def __init__(self) -> None:
        self.raw = ffi.new("sp_passed *")

    def __bool__(self) -> bool:
        return bool(self.raw.pages)

    def add(self, offset: int) -> None:
        """One page; the reference of what C does."""
        raw = self.raw
        if not raw.pages:
            raw.first = offset
        if not raw.pages or offset != raw.last + PAGE_BYTES:
            raw.runs += 1
        raw.pages += 1
        raw.last = offset


def pass_records(data, block_size: int, normal: Passed, zero: Passed) -> int:
    """Passes over the whole records in `data` (a buffer) that are pages of the block named last;
    returns how many bytes these have."""
    view = ffi.from_buffer("uint8_t[]", data)
    return lib.sp_pass_records(view, len(view), block_size, normal.raw, zero.raw)
