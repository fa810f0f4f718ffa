"""`info ramblock` of a destination against the source's block list."""

from __future__ import annotations

import pytest

from sharded_pc.destination import blocks
from sharded_pc.errors import UsageError
from sharded_pc.geometry import RamBlock

QEMU_7 = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
                pc.bios    4 KiB  0x0000000004020000 0x0000000000040000 0x0000000000040000
    /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000
 0000:00:02.0/odd name.rom    4 KiB  0x0000000004280000 0x0000000000010000 0x0000000000010000
"""
QEMU_10 = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    2 MiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f0000000000  rw
                pc.bios    4 KiB  0x0000000004020000 0x0000000000040000 0x0000000000040000 0x00007f1000000000  ro
    /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000 0x00007f2000000000  ro
 0000:00:02.0/odd name.rom    4 KiB  0x0000000004280000 0x0000000000010000 0x0000000000010000 0x00007f3000000000  ro
"""  # noqa: E501
SAME = [
    RamBlock("pc.ram", 64 << 20),
    RamBlock("pc.bios", 256 << 10),
    RamBlock("/rom@etc/acpi/tables", 128 << 10),
    RamBlock("0000:00:02.0/odd name.rom", 64 << 10),
]


@pytest.mark.parametrize("table", [QEMU_7, QEMU_10], ids=["7.2", "10.0"])
def test_table_is_read_whole(table):
    assert {n: b.used for n, b in blocks.parse(table).items()} == {b.name: b.size for b in SAME}
    blocks.compare(SAME, blocks.parse(table))
    blocks.compare(SAME[:1], blocks.parse(table))  # more of its own is the destination's affair


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (RamBlock("vga.vram", 16 << 20), r"no RAM block 'vga.vram' \(16 MiB\)"),
        (RamBlock("pc.bios", 128 << 10), "'pc.bios' has 256 KiB, the source's 128 KiB"),
        (RamBlock("pc.ram", 65 << 20), "'pc.ram' has 64 MiB, the source's 65 MiB"),
        (RamBlock("/rom@etc/acpi/tables", 4 << 20), "has 128 KiB, the source's 4 MiB"),
    ],
)
def test_what_does_not_fit_is_named(block, why):
    with pytest.raises(UsageError, match=why):
        blocks.compare([block], blocks.parse(QEMU_10))


def test_a_resizable_block_takes_another_size():
    blocks.compare([RamBlock("/rom@etc/acpi/tables", 256 << 10)], blocks.parse(QEMU_7))


def test_no_table():
    assert blocks.parse("unknown command: 'info ramblock'\n") == {}
