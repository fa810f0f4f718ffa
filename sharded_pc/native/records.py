"""RAM records of a block's content (records.h)."""

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
