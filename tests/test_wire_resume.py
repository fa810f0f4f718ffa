"""The stream that resumes a QEMU reads back as what it was made of."""

from __future__ import annotations

import struct

import pytest

from sharded_pc.geometry import RamBlock
from sharded_pc.native import oracle
from sharded_pc.native.records import block_records
from sharded_pc.wire import events, resume, writer
from sharded_pc.wire.constants import RamFlag
from sharded_pc.wire.feed import Feed
from sharded_pc.wire.ram import Channel

BIOS, TABLES = RamBlock("pc.bios", 3 * 4096), RamBlock("/rom@etc/acpi/tables", 4096)


def test_head_is_what_qemu_reads():
    """Byte for byte, from the layout in QEMU's savevm.c and ram.c: configuration with the
    capability, block list with an address for each block."""
    made = resume.head("pc-i440fx-7.2", [(RamBlock("pc.ram", 1 << 20), 0), (BIOS, 0)])
    name = b"configuration/capabilities"
    expected = (
        b"QEVM\0\0\0\3"
        + b"\x07"
        + struct.pack(">I", 13)
        + b"pc-i440fx-7.2"
        + b"\x05"
        + bytes([len(name)])
        + name
        + struct.pack(">II", 1, 1)
        + b"\x0fx-ignore-shared"
        + b"\x01"
        + struct.pack(">I", 2)
        + b"\x03ram"
        + struct.pack(">II", 0, 4)
        + struct.pack(">Q", (1 << 20) + 3 * 4096 | RamFlag.MEM_SIZE)
        + b"\x06pc.ram"
        + struct.pack(">QQ", 1 << 20, 0)
        + b"\x07pc.bios"
        + struct.pack(">QQ", 3 * 4096, 0)
        + struct.pack(">Q", RamFlag.EOS)
        + b"\x7e"
        + struct.pack(">I", 2)
        + b"\x03"
        + struct.pack(">I", 2)
    )
    assert made == expected


def test_addresses_stand_with_their_blocks():
    made = resume.head("q35", [(RamBlock("a", 4096), 0), (RamBlock("b", 8192), 4096)])
    assert (
        b"\x01a" + struct.pack(">QQ", 4096, 0) + b"\x01b" + struct.pack(">QQ", 8192, 4096) in made
    )


def test_tail_ends_with_a_description_so_that_qemu_does_not_warn():
    footer = b"\x7e" + struct.pack(">I", 2)
    assert resume.end_of_ram() == struct.pack(">Q", RamFlag.EOS) + footer
    assert resume.tail(b"devices") == b"devices" + b"\0\x06\0\0\0\x02{}"


@pytest.mark.parametrize("zeros", [(), (0,), (1,), (0, 1, 2)])
def test_block_records_read_back(zeros):
    pages = [bytes(4096) if i in zeros else oracle.fill(1, 0, i, 1) for i in range(3)]
    blocks = {BIOS.name: BIOS}
    feed = Feed(Channel(blocks).records())
    got = feed.feed(block_records(BIOS.name, 0, b"".join(pages)) + writer.eos())
    assert feed.done
    assert got == [
        events.RamZeroPage(BIOS.name, i * 4096)
        if i in zeros
        else events.RamPage(BIOS.name, i * 4096, page)
        for i, page in enumerate(pages)
    ]


def test_almost_zero_pages_are_data():
    for at in (0, 1, 4095):
        page = bytearray(4096)
        page[at] = 1
        feed = Feed(Channel({TABLES.name: TABLES}).records())
        (event,) = feed.feed(block_records(TABLES.name, 0, bytes(page)) + writer.eos())
        assert event == events.RamPage(TABLES.name, 0, bytes(page))
