"""A multifd channel as it was recorded: its opening, then packets (wire/multifd.py), without their
data, and also those that a receiver refuses: device state, packed in a way that it lacks."""

from __future__ import annotations

import dataclasses
import struct

from sharded_pc.dump.wishes import BEGIN, Ahead, Skip
from sharded_pc.errors import RemoteProtocolError
from sharded_pc.wire import multifd
from sharded_pc.wire.constants import MULTIFD_MAGIC
from sharded_pc.wire.multifd import PACKET_PAGES, VERSION, Flag
from sharded_pc.wire.steps import TELL, Parser, text

MOST_BYTES = 1 << 30
"""Of a device's state."""
FLAGS = {flag.value: flag.name.lower().replace("_", "-") for flag in Flag}  # type: ignore[union-attr]
_HEAD = struct.Struct(">III")
_PAGES = struct.Struct(f">IIIQI28x256s{PACKET_PAGES}Q")
_DEVICE = struct.Struct(">256sII")
assert _HEAD.size + _PAGES.size == multifd.PACKET_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Greeting:
    uuid: bytes
    channel: int


@dataclasses.dataclass(frozen=True, slots=True)
class Packet:
    flags: int
    number: int
    block: str
    normal: tuple[int, ...]
    zero: tuple[int, ...]
    size: int
    """bytes of pages behind it"""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceState:
    """Since QEMU 10.0: a device's state beside the main stream."""

    flags: int
    name: str
    instance: int
    size: int


def channel() -> Parser:
    """Greeting, then packets until the channel is closed."""
    yield BEGIN
    raw = yield multifd.OPENING_BYTES
    yield Greeting(bytes(raw[8:24]), multifd.parse_opening(raw))
    while (yield Ahead(1)):
        yield BEGIN
        at = yield TELL
        try:
            yield from _packet()
        except RemoteProtocolError as error:
            error.offset = at if error.offset is None else error.offset
            raise


def _packet() -> Parser:
    magic, version, flags = _HEAD.unpack((yield _HEAD.size))
    if magic != MULTIFD_MAGIC:
        raise multifd.bad_magic(magic)
    if version != VERSION:
        raise multifd.bad_version(version)
    if flags & Flag.DEVICE_STATE:
        name, instance, size = _DEVICE.unpack((yield _DEVICE.size))
        most = MOST_BYTES
        yield DeviceState(flags, _name(name), instance, size)
    else:
        _, normal, size, number, zero, name, *offsets = _PAGES.unpack((yield _PAGES.size))
        most = multifd.MAX_PACKED_BYTES
        if normal + zero > PACKET_PAGES:
            raise multifd.too_many_pages(normal + zero, PACKET_PAGES)
        pages = tuple(offsets[:normal]), tuple(offsets[normal : normal + zero])
        size = size if normal else 0  # else left over from the packet before it
        yield Packet(flags, number, _name(name), *pages, size)
    if size > most:
        raise RemoteProtocolError(f"multifd: payload of {size} bytes, expected at most {most}")
    yield Skip(size)


def _name(raw: bytes) -> str:
    return text(raw.partition(b"\0")[0])
