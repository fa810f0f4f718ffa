"""Messages of the return path: be16 type, be16 length, payload (QEMU migration/migration.h)."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.wire.constants import Rp
from sharded_pc.wire.steps import Parser, number, text

LARGEST = 512
"""A QEMU source closes its return path on anything longer."""

LARGEST_REQUEST = 1 << 30
"""Bytes: QEMU reads a request's length as a signed int (migration/ram.c ram_save_queue_pages)."""


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


def req_span(start: int, length: int, block: str) -> Iterator[bytes]:
    """Requests for any number of bytes."""
    for at in range(start, start + length, LARGEST_REQUEST):
        yield req_pages(at, min(LARGEST_REQUEST, start + length - at), block)


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


_LENGTHS = {
    Rp.SHUT: range(4, 5),
    Rp.PONG: range(4, 5),
    Rp.REQ_PAGES_ID: range(14, 13 + 256),
    Rp.REQ_PAGES: range(12, 13),
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


def messages() -> Parser:
    """Parser of a return path as a source sees it: Shut, Pong, ReqPages for ever."""
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
            case Rp.REQ_PAGES_ID | Rp.REQ_PAGES:
                start, length = struct.unpack(">QI", payload[:12])
                if kind == Rp.REQ_PAGES_ID:
                    block = text(payload[13:])
                if block is None:
                    raise RemoteProtocolError("REQ_PAGES before any REQ_PAGES_ID")
                yield ReqPages(block, start, length)
