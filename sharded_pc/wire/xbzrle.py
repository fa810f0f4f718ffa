"""xbzrle: a page as its difference to what stands there (QEMU migration/xbzrle.c).

Runs of bytes that stay and of bytes that are replaced take turns, the first kind first; a length is
LEB128 of at most two bytes.  native/stream/xbzrle.c does the same.
"""

from __future__ import annotations

from sharded_pc.geometry import PAGE_BYTES

ENCODING = 1
"""QEMU's ENCODING_FLAG_XBZRLE."""


class _Bad(Exception):
    pass


def _length(encoded: bytes, at: int) -> tuple[int, int]:
    """(the length that stands at `at`, where it ends)"""
    if len(encoded) - at < 2:  # a length is never the last byte
        raise _Bad
    if encoded[at] < 0x80:
        return encoded[at], at + 1
    if encoded[at + 1] & 0x80:
        raise _Bad
    return encoded[at] & 0x7F | encoded[at + 1] << 7, at + 2


def _patch(page: bytearray, encoded: bytes) -> None:
    at = to = 0
    while at < len(encoded):
        same, behind = _length(encoded, at)
        changed, first = _length(encoded, behind)
        if changed == 0 or (same == 0 and at > 0):  # only the first run may be empty
            raise _Bad
        to += same
        at = first + changed
        if to + changed > PAGE_BYTES or at > len(encoded):
            raise _Bad
        page[to : to + changed] = encoded[first:at]
        to += changed


def patched(page: bytes, encoded: bytes) -> bytes | None:
    """The page after the change; None if `encoded` is none."""
    out = bytearray(page)
    try:
        _patch(out, encoded)
    except _Bad:
        return None
    return bytes(out)


def difference(before: bytes, after: bytes) -> bytes:
    """What a source sends; empty if nothing changed."""
    out, at = bytearray(), 0
    while at < PAGE_BYTES:
        start = at
        while at < PAGE_BYTES and before[at] == after[at]:
            at += 1
        if at == PAGE_BYTES:
            break
        first = at
        while at < PAGE_BYTES and before[at] != after[at]:
            at += 1
        out += _leb128(first - start) + _leb128(at - first) + after[first:at]
    return bytes(out)


def _leb128(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7])
