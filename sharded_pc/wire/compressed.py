"""A page as zlib data (QEMU's capability compress, until 9.0)."""

from __future__ import annotations

import zlib

from sharded_pc.geometry import PAGE_BYTES

MOST_BYTES = PAGE_BYTES + (PAGE_BYTES >> 12) + 13
"""zlib's compressBound() of a page: what a source's buffer holds."""


def inflated(data: bytes) -> bytes | None:
    """The page; None unless `data` is all of the stream of one page."""
    inflating = zlib.decompressobj()
    try:
        page = inflating.decompress(data, PAGE_BYTES + 1)
    except zlib.error:
        return None
    whole = inflating.eof and not inflating.unused_data
    return page if whole and len(page) == PAGE_BYTES else None


def deflated(page: bytes, level: int = 1) -> bytes:
    """What a source sends."""
    return zlib.compress(page, level)
