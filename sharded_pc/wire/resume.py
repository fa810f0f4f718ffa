"""The stream that makes a QEMU resume on RAM it shares with us: a precopy that has all but the RAM.

A destination started with x-ignore-shared takes no pages for shared blocks, so this stream holds
the configuration (with that capability, which both sides must agree on), the block list, all pages
of the blocks that are not shared, the source's device state, the end, and an empty vmdescription
(without one QEMU prints a warning).  Order and layout: QEMU migration/savevm.c, ram.c.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from sharded_pc.geometry import RamBlock
from sharded_pc.wire import writer
from sharded_pc.wire.constants import RAM_SECTION_VERSION, RamFlag, Section

CAPABILITY = b"x-ignore-shared"


def _capabilities() -> bytes:
    name = b"configuration/capabilities"
    head = struct.pack(">BB", Section.SUBSECTION, len(name)) + name + struct.pack(">I", 1)
    return head + struct.pack(">IB", 1, len(CAPABILITY)) + CAPABILITY


def _block_list(blocks: Sequence[tuple[RamBlock, int]]) -> bytes:
    out = struct.pack(">Q", sum(block.size for block, _ in blocks) | RamFlag.MEM_SIZE)
    for block, address in blocks:
        name = block.name.encode("utf-8", "surrogateescape")
        out += bytes([len(name)]) + name + struct.pack(">QQ", block.size, address)
    return out


def head(machine: str, blocks: Sequence[tuple[RamBlock, int]]) -> bytes:
    """Everything before the pages.  `blocks`: all blocks under the destination's names, in the
    source's order, each with its address (compared by QEMU for shared ones only)."""
    start = struct.pack(">BI", Section.START, writer.RAM_SECTION) + b"\x03ram"
    start += struct.pack(">II", 0, RAM_SECTION_VERSION)
    setup = start + _block_list(blocks) + writer.eos() + writer.footer()
    end = struct.pack(">BI", Section.END, writer.RAM_SECTION)
    return writer.header() + writer.configuration(machine) + _capabilities() + setup + end


def end_of_ram() -> bytes:
    """What follows the pages; QEMU waits for devices then."""
    return writer.eos() + writer.footer()


def tail(devices: bytes) -> bytes:
    """Everything behind the RAM."""
    return devices + writer.eof() + writer.vmdescription({})
