"""Whole migration streams and what they say, as data for test_wire_stream.py."""

from __future__ import annotations

import dataclasses
import json
import struct

from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.wire import events as e
from sharded_pc.wire import writer as w
from sharded_pc.wire.constants import Cmd, Section
from sharded_pc.wire.package import LISTEN, RUN

BLOCKS = (RamBlock("pc.ram", 16 * PAGE_BYTES), RamBlock("pc.bios", PAGE_BYTES))
MACHINE = "pc-i440fx-7.2"
DATA = bytes(range(256)) * 16
HEAD = w.header() + w.configuration(MACHINE)
SETUP = w.ram_setup(BLOCKS)
READY = HEAD + SETUP
DEVICE = w.full_section(3, "timer", b"\x00" * 9)


@dataclasses.dataclass(frozen=True, slots=True)
class Good:
    name: str
    stream: bytes
    events: tuple
    """without Configuration and the setup section's, if the stream begins with READY"""
    whole_until: int | None = None
    """a cut from here on cannot be told from the end"""


def subsection(name: str, body: bytes) -> bytes:
    return bytes([Section.SUBSECTION, len(name)]) + name.encode() + struct.pack(">I", 1) + body


def capabilities(*names: str) -> bytes:
    body = b"".join(bytes([len(name)]) + name.encode() for name in names)
    return subsection("configuration/capabilities", struct.pack(">I", len(names)) + body)


CONFIGURATION = (
    HEAD
    + subsection("configuration/target-page-bits", struct.pack(">I", 12))
    + capabilities("auto-converge", "x-colo")
    + subsection("configuration/uuid", bytes(range(16)))
)

POSTCOPY = (
    READY
    + w.open_return_path()
    + w.ping(1)
    + w.postcopy_advise()
    + w.ram_section(w.page("pc.ram", 0, DATA) + w.zero_page(None, 0x1000))
    + w.ram_section(b"")
    + w.command(Cmd.SWITCHOVER_START)
    + w.discard("pc.ram", [(0x1000, 0x2000), (0x8000, 0x1000)])
    + w.ping(2)
    + w.packaged(DEVICE, (3, 0x42))
    + w.ping(4)
    + w.ram_section(w.page("pc.bios", 0, DATA), last=True)
    + w.eof()
)
POSTCOPY_EVENTS = (
    e.OpenReturnPath(),
    e.Ping(1),
    e.PostcopyAdvise(4096, 4096),
    e.RamSection("part"),
    e.RamPage("pc.ram", 0, DATA),
    e.RamZeroPage("pc.ram", 0x1000),
    e.RamSectionEnd("part"),
    e.RamSection("part"),
    e.RamSectionEnd("part"),
    e.SwitchoverStart(),
    e.RamDiscard("pc.ram", ((0x1000, 0x2000), (0x8000, 0x1000))),
    e.Ping(2),
    e.Packaged(len(LISTEN) + len(DEVICE) + 18 + len(RUN)),
    e.PostcopyListen(),
    e.PackagedDevices(DEVICE),
    e.Ping(3),
    e.Ping(0x42),
    e.PostcopyRun(),
    e.Ping(4),
    e.RamSection("end"),
    e.RamPage("pc.bios", 0, DATA),
    e.RamSectionEnd("end"),
    e.Eof(),
)
END = w.ram_section(w.zero_page("pc.ram", 0), last=True)
END_EVENTS = (
    e.RamSection("end"),
    e.RamZeroPage("pc.ram", 0),
    e.RamSectionEnd("end"),
)
DESCRIPTION = {"page_size": 4096, "devices": [{"name": "timer", "note": "\u0000\u0006 {}"}]}
RAW_DESCRIPTION = json.dumps(DESCRIPTION).encode()

NESTED = b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}"
"""Deeper than Python's JSON reader goes."""
_TRICKY = {
    "a device": b"state",
    "EOF and VMDESCRIPTION marks": b"\0\6" * 20,
    "a mark and a length": b"\0\6\0\0\0\5{....",
    "a length that is the rest's": b"\0\6\0\0\0\x40",
    "a mark, a length, a brace": b"\0\6\0\0\xff\xff{",
    "a description that is no JSON": b"\0\6\0\0\0\7{ooops}",
    "JSON without a mark": RAW_DESCRIPTION,
    "a mark, a wrong length and JSON": b"\0\6\0\0\0\x01" + RAW_DESCRIPTION,
    "zeros": bytes(40),
    "a huge length": b"\0\6\xff\xff\xff\xff{",
    "a description that is too deep": b"\0\6" + struct.pack(">I", len(NESTED)) + NESTED,
}


def _precopy(name: str, body: bytes) -> Good:
    devices = w.full_section(3, "timer", body) + w.full_section(4, "cpu", body, version=12)
    stream = READY + END + devices + w.eof() + w.vmdescription(DESCRIPTION)
    events = (*END_EVENTS, e.Devices(devices), e.Eof(), e.VmDescription(RAW_DESCRIPTION))
    return Good(f"precopy, {name}", stream, events)


def _undescribed(name: str, body: bytes) -> Good:
    """As old machine types end: EOF, then the wire is closed."""
    devices = w.full_section(3, "timer", body)
    stream = READY + END + devices + w.eof()
    return Good(f"undescribed, {name}", stream, (*END_EVENTS, e.Devices(devices), e.Eof()))


CONFIGURED = Good(
    "configuration subsections",
    CONFIGURATION + SETUP + END + w.eof(),
    (*END_EVENTS, e.Eof()),
)
GOOD = (
    Good("postcopy", POSTCOPY, POSTCOPY_EVENTS),
    CONFIGURED,
    *(_precopy(name, body) for name, body in _TRICKY.items()),
)
UNDESCRIBED = tuple(_undescribed(name, body) for name, body in _TRICKY.items())
