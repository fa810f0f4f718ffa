"""Messages of the return path: be16 type, be16 length, payload (QEMU migration/migration.h)."""

from __future__ import annotations

import dataclasses
import struct

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.wire.constants import MAX_RAM_BYTES, Rp
from sharded_pc.wire.steps import Parser, Some, number, text

LARGEST = 512
"""A QEMU source closes its return path on anything longer."""

RESUMED = 1
"""The value of RESUME_ACK (QEMU migration/migration.h MIGRATION_RESUME_ACK_VALUE)."""

MAX_BITMAP_BYTES = MAX_RAM_BYTES // PAGE_BYTES // 8

BITMAP_END = 0x0123456789ABCDEF
"""Behind a received bitmap (QEMU migration/ram.c RAMBLOCK_RECV_BITMAP_ENDING)."""


def message(kind: Rp, payload: bytes) -> bytes:
    return struct.pack(">HH", kind, len(payload)) + payload


def shut(value: int = 0) -> bytes:
    """0: all is well; anything else makes the source fail."""
    return message(Rp.SHUT, struct.pack(">I", value))


def pong(value: int) -> bytes:
    return message(Rp.PONG, struct.pack(">I", value))


def req_pages(start: int, length: int, block: str | None = None) -> bytes:
    """A request for `length` bytes from `start` on; without a block, of the one named last."""
    where = struct.pack(">QI", start, length)
    if block is None:
        return message(Rp.REQ_PAGES, where)
    name = block.encode("utf-8", "surrogateescape")
    return message(Rp.REQ_PAGES_ID, where + bytes([len(name)]) + name)


def resume_ack() -> bytes:
    """Recovery: we are ready for pages."""
    return message(Rp.RESUME_ACK, struct.pack(">I", RESUMED))


def switchover_ack() -> bytes:
    """The source may stop its guest and switch."""
    return message(Rp.SWITCHOVER_ACK, b"")


def recv_bitmap(block: str, words: bytes) -> bytes:
    """Recovery: the received bits of a block, in little-endian 8-byte words (the receiver's own are
    written in C, native/back/return_path.c)."""
    name = block.encode("utf-8", "surrogateescape")
    head = message(Rp.RECV_BITMAP, bytes([len(name)]) + name)
    return head + struct.pack(">Q", len(words)) + words + struct.pack(">Q", BITMAP_END)


@dataclasses.dataclass(frozen=True, slots=True)
class Shut:
    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class Pong:
    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class ReqPages:
    block: str
    start: int
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class RecvBitmap:
    block: str
    words: bytes
    """bit n of these little-endian 8-byte words: page n is here"""


@dataclasses.dataclass(frozen=True, slots=True)
class ResumeAck:
    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class SwitchoverAck:
    pass


_LENGTHS = {
    Rp.SHUT: range(4, 5),
    Rp.PONG: range(4, 5),
    Rp.REQ_PAGES_ID: range(14, 13 + 256),
    Rp.REQ_PAGES: range(12, 13),
    Rp.RECV_BITMAP: range(2, 1 + 256),
    Rp.RESUME_ACK: range(4, 5),
    Rp.SWITCHOVER_ACK: range(1),
}
"""Payload bytes of the messages that a source reads here."""


def _check(kind: int, payload: bytes) -> None:
    if kind not in _LENGTHS:
        raise RemoteProtocolError(f"return path message of unknown type {kind}")
    if len(payload) not in _LENGTHS[Rp(kind)]:
        raise RemoteProtocolError(f"{Rp(kind).name} of {len(payload)} bytes")
    if kind == Rp.REQ_PAGES_ID and len(payload) != 13 + payload[12]:
        raise RemoteProtocolError(
            f"{Rp.REQ_PAGES_ID.name} of {len(payload)} bytes with a name of {payload[12]}"
        )
    if kind == Rp.RECV_BITMAP and len(payload) != 1 + payload[0]:
        raise RemoteProtocolError(
            f"{Rp.RECV_BITMAP.name} of {len(payload)} bytes with a name of {payload[0]}"
        )


def _bitmap(payload: bytes) -> Parser:
    """What stands behind a RECV_BITMAP's message: be64 size, the words, be64 end mark."""
    size = yield from number(8)
    if size % 8 or size > MAX_BITMAP_BYTES:
        raise RemoteProtocolError(f"received bitmap of {size} bytes")
    words = bytearray()
    while len(words) < size:
        words += yield Some(size - len(words))
    end = yield from number(8)
    if end != BITMAP_END:
        raise RemoteProtocolError(f"received bitmap ends with {end:#018x}")
    return RecvBitmap(text(payload[1:]), bytes(words))


def messages() -> Parser:
    """Parser of a return path as a source sees it: Shut, Pong, ReqPages, RecvBitmap, ResumeAck and
    SwitchoverAck for ever."""
    block: str | None = None
    while True:
        kind = yield from number(2)
        size = yield from number(2)
        if size > LARGEST:
            raise RemoteProtocolError(f"return path message {kind} of {size} bytes")
        payload = bytes((yield size)) if size else b""
        _check(kind, payload)
        match kind:
            case Rp.SHUT:
                yield Shut(int.from_bytes(payload, "big"))
            case Rp.PONG:
                yield Pong(int.from_bytes(payload, "big"))
            case Rp.RESUME_ACK:
                yield ResumeAck(int.from_bytes(payload, "big"))
            case Rp.SWITCHOVER_ACK:
                yield SwitchoverAck()
            case Rp.RECV_BITMAP:
                yield (yield from _bitmap(payload))
            case Rp.REQ_PAGES_ID | Rp.REQ_PAGES:
                start, length = struct.unpack(">QI", payload[:12])
                if kind == Rp.REQ_PAGES_ID:
                    block = text(payload[13:])
                if block is None:
                    raise RemoteProtocolError("REQ_PAGES before any REQ_PAGES_ID")
                yield ReqPages(block, start, length)
