"""Channels of multifd (QEMU migration/multifd.c): the reference, and the texts of its errors.

A channel opens with 64 bytes, then come packets of 1344 bytes, each with the data of its pages
behind it.  The array of offsets has always its whole length, whatever `pages_alloc` says (0 in a
newer QEMU's SYNC).  Pages with data come first, then, from QEMU 9.0 on, pages of zeros; an older
one sends these on the main channel.  native/multifd/ does the same at speed; the error functions
below make the text for both.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import zlib
from collections.abc import Mapping

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.wire import constants as c
from sharded_pc.wire.steps import TELL, Parser, text

VERSION = 1
PACKET_PAGES = 128
"""MULTIFD_PACKET_SIZE (512 KiB) in target pages, in each QEMU from 4.0 to 10.1."""
MAX_PACKED_BYTES = 2 * PACKET_PAGES * PAGE_BYTES
"""A compressed payload (QEMU's zbuff_len)."""
MAX_CHANNELS = 255
"""`multifd-channels` is a byte."""

_OPENING = struct.Struct(">II16sB39x")
_HEADER = struct.Struct(">6IQI28x256s")
OPENING_BYTES = _OPENING.size
PACKET_BYTES = _HEADER.size + 8 * PACKET_PAGES
assert (OPENING_BYTES, PACKET_BYTES) == (64, 1344)


class Flag(enum.IntFlag):
    """MULTIFD_FLAG_*; three bits and more from ZLIB on are one number."""

    SYNC = 1
    ZLIB = 2
    ZSTD = 4
    QPL = 8
    UADK = 16
    QATZIP = 32
    DEVICE_STATE = 64


METHODS = Flag.ZLIB | Flag.ZSTD | Flag.QPL | Flag.UADK | Flag.QATZIP
_KNOWN = int(Flag.SYNC | Flag.ZLIB | Flag.ZSTD)
"""A number: the complement of flags has no unknown ones."""


@dataclasses.dataclass(frozen=True, slots=True)
class Packet:
    """Pages as offsets in `block`; `data` is that of the normal ones, unpacked.  `block` is ""
    where there are none."""

    number: int
    sync: bool
    block: str = ""
    normal: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    data: bytes = b""


def bad_magic(magic: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"multifd: magic {magic:#010x} where a packet begins, expected {c.MULTIFD_MAGIC:#010x}"
    )


def bad_version(version: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"multifd: version {version}, expected {VERSION}")


def unsupported(flags: int) -> RemoteProtocolError:
    """Flags that are unknown, or a method that this build lacks or that changes in mid-stream."""
    if flags & Flag.DEVICE_STATE:
        return RemoteProtocolError(
            "multifd: device state on a channel (turn the source's multifd device transfer off)"
        )
    for method in (Flag.QPL, Flag.UADK, Flag.QATZIP, Flag.ZSTD, Flag.ZLIB):
        if flags & method:
            return RemoteProtocolError(
                f"multifd: pages compressed by {method.name.lower()} (flags {flags:#x}) cannot be "
                f"unpacked here: set the source's multifd-compression to none"
            )
    return RemoteProtocolError(f"multifd: packet with unknown flags {flags:#x}")


def too_many_pages(pages: int, room: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"multifd: packet of {pages} pages, expected at most {room}")


def bad_size(size: int, expected: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"multifd: payload of {size} bytes, expected {'at most ' * (expected == MAX_PACKED_BYTES)}"
        f"{expected}"
    )


def unknown_block(name: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"multifd: packet for unknown block {name!r}")


def bad_offset(offset: int, block: str, size: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"multifd: offset {offset:#x} is no page of block {block!r} of {size:#x} bytes"
    )


def bad_packing(size: int, expected: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"multifd: {size} compressed bytes do not unpack to {expected} bytes of pages"
    )


def late_pages() -> RemoteProtocolError:
    return RemoteProtocolError("multifd: pages on a channel after the source's switch")


def cut() -> RemoteProtocolError:
    return RemoteProtocolError("multifd: the channel ended in the middle of a packet")


def parse_opening(raw: bytes) -> int:
    """The channel's number.  RemoteProtocolError."""
    magic, version, _uuid, channel = _OPENING.unpack(raw)
    if magic != c.MULTIFD_MAGIC:
        raise bad_magic(magic)
    if version != VERSION:
        raise bad_version(version)
    return channel


def opening(channel: int, uuid: bytes = bytes(16)) -> bytes:
    return _OPENING.pack(c.MULTIFD_MAGIC, VERSION, uuid, channel)


def header(
    number: int,
    flags: int = 0,
    block: str = "",
    normal: tuple[int, ...] | list[int] = (),
    zero: tuple[int, ...] | list[int] = (),
    size: int | None = None,
    room: int = PACKET_PAGES,
) -> bytes:
    """A packet without its payload; `size` is that one's, by default as of uncompressed pages."""
    size = len(normal) * PAGE_BYTES if size is None else size
    head = _HEADER.pack(
        c.MULTIFD_MAGIC, VERSION, flags, room, len(normal), size, number, len(zero), block.encode()
    )
    offsets = (*normal, *zero)
    return head + struct.pack(f">{len(offsets)}Q", *offsets).ljust(8 * PACKET_PAGES, b"\0")


class Reader:
    """The packets of one channel behind its opening."""

    def __init__(self, blocks: Mapping[str, RamBlock]) -> None:
        self._blocks = blocks
        self._method = 0
        self._zlib = zlib.decompressobj()

    def packets(self) -> Parser:
        """Packet events for ever; errors carry the packet's offset in the channel."""
        while True:
            at = yield TELL
            try:
                yield (yield from self._packet())
            except RemoteProtocolError as error:
                error.offset = at if error.offset is None else error.offset
                raise

    def _packet(self) -> Parser:
        raw = yield PACKET_BYTES
        magic, version, flags, room, normal, size, number, zero, name = _HEADER.unpack_from(raw)
        if magic != c.MULTIFD_MAGIC:
            raise bad_magic(magic)
        if version != VERSION:
            raise bad_version(version)
        if flags & ~_KNOWN:
            raise unsupported(flags)
        _check_counts(room, normal, zero)
        _check_size(flags, normal, size)
        sync = bool(flags & Flag.SYNC)
        if normal + zero == 0:
            return Packet(number, sync)
        block = self._block(name)
        offsets = struct.unpack_from(f">{normal + zero}Q", raw, _HEADER.size)
        for offset in offsets:
            if offset % PAGE_BYTES or offset >= block.size:
                raise bad_offset(offset, block.name, block.size)
        data = b""
        if normal:
            data = self._unpacked(flags, (yield size), normal * PAGE_BYTES)
        return Packet(number, sync, block.name, offsets[:normal], offsets[normal:], data)

    def _block(self, raw: bytes) -> RamBlock:
        name = text(raw.split(b"\0")[0])
        if b"\0" not in raw or name not in self._blocks:
            raise unknown_block(name[:255])
        return self._blocks[name]

    def _unpacked(self, flags: int, payload: bytes, size: int) -> bytes:
        method = flags & METHODS
        if method == 0:
            return payload
        if method != Flag.ZLIB or self._method not in (0, method):
            raise unsupported(flags)
        self._method = method
        try:
            data = self._zlib.decompress(payload, size + 1)
        except zlib.error:
            data = b""
        if len(data) != size:
            raise bad_packing(len(payload), size)
        return data


def _check_counts(room: int, normal: int, zero: int) -> None:
    if room > PACKET_PAGES:
        raise too_many_pages(room, PACKET_PAGES)
    if normal + zero > room:
        raise too_many_pages(normal + zero, room)


def _check_size(flags: int, normal: int, size: int) -> None:
    """What an empty packet says of a payload is left over from the one before it."""
    if normal == 0:
        return
    plain = normal * PAGE_BYTES
    if not flags & METHODS:
        if size != plain:
            raise bad_size(size, plain)
    elif not 0 < size <= MAX_PACKED_BYTES:
        raise bad_size(size, MAX_PACKED_BYTES)
