"""The stream as a source writes it: pure functions from values to bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence

from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.wire import constants as c
from sharded_pc.wire import package
from sharded_pc.wire.constants import Cmd, RamFlag, Section

RAM_SECTION = 2
"""The section id QEMU gives `ram` on a PC."""


def _name(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return bytes([len(raw)]) + raw


def header() -> bytes:
    return struct.pack(">II", c.FILE_MAGIC, c.FILE_VERSION)


def configuration(machine: str) -> bytes:
    raw = machine.encode()
    return struct.pack(">BI", Section.CONFIGURATION, len(raw)) + raw


def command(cmd: Cmd, payload: bytes = b"") -> bytes:
    return struct.pack(">BHH", Section.COMMAND, cmd, len(payload)) + payload


def open_return_path() -> bytes:
    return command(Cmd.OPEN_RETURN_PATH)


def ping(value: int) -> bytes:
    return command(Cmd.PING, struct.pack(">I", value))


def postcopy_advise(page_sizes: int = 4096, target_page_size: int = 4096) -> bytes:
    return command(Cmd.POSTCOPY_ADVISE, struct.pack(">QQ", page_sizes, target_page_size))


def discard(block: str, ranges: Sequence[tuple[int, int]]) -> bytes:
    """One POSTCOPY_RAM_DISCARD; at most 12 (start, length) pairs in bytes."""
    pairs = b"".join(struct.pack(">QQ", *pair) for pair in ranges)
    return command(Cmd.POSTCOPY_RAM_DISCARD, b"\0" + _name(block) + b"\0" + pairs)


def recv_bitmap(block: str) -> bytes:
    """Recovery: asks which pages of a block the destination has."""
    return command(Cmd.RECV_BITMAP, _name(block))


def postcopy_resume() -> bytes:
    """Recovery: all bitmaps are here, pages follow."""
    return command(Cmd.POSTCOPY_RESUME)


def packaged(devices: bytes, pings: Iterable[int] = (3,)) -> bytes:
    """LISTEN, device state, PINGs and RUN as one blob."""
    blob = package.LISTEN + devices + b"".join(map(ping, pings)) + package.RUN
    return command(Cmd.PACKAGED, struct.pack(">I", len(blob))) + blob


def _record(value: int) -> bytes:
    return struct.pack(">Q", value)


def eos() -> bytes:
    return _record(RamFlag.EOS)


def multifd_flush() -> bytes:
    return _record(RamFlag.MULTIFD_FLUSH)


def footer() -> bytes:
    return struct.pack(">BI", Section.FOOTER, RAM_SECTION)


def ram_setup(blocks: Sequence[RamBlock]) -> bytes:
    """The START section with the block list, as behind postcopy_advise()."""
    out = struct.pack(">BI", Section.START, RAM_SECTION) + _name("ram")
    out += struct.pack(">II", 0, c.RAM_SECTION_VERSION)
    out += _record(sum(block.size for block in blocks) | RamFlag.MEM_SIZE)
    for block in blocks:
        out += _name(block.name) + struct.pack(">Q", block.size)
        if block.source_page_size != PAGE_BYTES:
            out += struct.pack(">Q", block.source_page_size)
    return out + eos() + footer()


def ram_section(records: bytes, *, last: bool = False) -> bytes:
    """A PART (or END) section around RAM records."""
    kind = Section.END if last else Section.PART
    return struct.pack(">BI", kind, RAM_SECTION) + records + eos() + footer()


def page(block: str | None, offset: int, data: bytes) -> bytes:
    """One PAGE record; without a block it continues the last one."""
    if block is None:
        return _record(offset | RamFlag.PAGE | RamFlag.CONTINUE) + data
    return _record(offset | RamFlag.PAGE) + _name(block) + data


def zero_page(block: str | None, offset: int, fill: int = 0) -> bytes:
    if block is None:
        return _record(offset | RamFlag.ZERO | RamFlag.CONTINUE) + bytes([fill])
    return _record(offset | RamFlag.ZERO) + _name(block) + bytes([fill])


def xbzrle_page(block: str | None, offset: int, encoded: bytes, encoding: int = 1) -> bytes:
    """One XBZRLE record (xbzrle.difference)."""
    head = _record(offset | RamFlag.XBZRLE | (RamFlag.CONTINUE if block is None else 0))
    name = b"" if block is None else _name(block)
    return head + name + struct.pack(">BH", encoding, len(encoded)) + encoded


def compressed_page(block: str | None, offset: int, data: bytes) -> bytes:
    """One COMPRESS_PAGE record (compressed.deflated)."""
    head = _record(offset | RamFlag.COMPRESS_PAGE | (RamFlag.CONTINUE if block is None else 0))
    name = b"" if block is None else _name(block)
    return head + name + struct.pack(">I", len(data)) + data


def eof() -> bytes:
    return bytes([Section.EOF])


def full_section(section: int, name: str, body: bytes, version: int = 1) -> bytes:
    """A device's FULL section with its footer."""
    head = struct.pack(">BI", Section.FULL, section) + _name(name)
    return head + struct.pack(">II", 0, version) + body + struct.pack(">BI", 0x7E, section)


def vmdescription(description: dict) -> bytes:
    raw = json.dumps(description).encode()
    return struct.pack(">BI", Section.VMDESCRIPTION, len(raw)) + raw
