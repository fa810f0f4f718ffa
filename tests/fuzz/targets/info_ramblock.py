"""QEMU's `info ramblock`: a table, empty if it is none; comparing fits or is a UsageError."""

from __future__ import annotations

import contextlib

from sharded_pc.destination import blocks
from sharded_pc.errors import UsageError
from sharded_pc.geometry import RamBlock

WANTED = (RamBlock("pc.ram", 64 << 20), RamBlock("pc.bios", 256 << 10))
TOKENS = (b" pc.ram ", b" 4 KiB ", b"0x0000000004000000 ", b"\n", b"\r", b"   ", b"0x")


def one_input(data: bytes) -> None:
    table = blocks.parse(data.decode("utf-8", "surrogateescape"))
    for listed in table.values():
        assert listed.used >= 0 and listed.most >= 0
    with contextlib.suppress(UsageError):
        blocks.compare(WANTED, table)
