"""A QEMU command line, one word a line: a plan whose words are text, or UsageError."""

from __future__ import annotations

import contextlib

from sharded_pc import qemu_args
from sharded_pc.errors import UsageError
from sharded_pc.geometry import RamBlock

BLOCKS = (
    RamBlock("pc.ram", 256 << 20),
    RamBlock("ram0", 64 << 20),
    RamBlock("ram1", 64 << 20),
    RamBlock("pc.bios", 256 << 10),
)
PATHS = {block.name: f"/dev/shm/guest.{block.name}" for block in BLOCKS}
TOKENS = (
    b"\n-m\n",
    b"\n-object\n",
    b"\n-machine\n",
    b"\n-numa\nnode,memdev=ram0",
    b"\n-device\n",
    b"memory-backend-ram,id=ram0,size=64M",
    b"pc-dimm,memdev=ram0",
    b"size=",
    b",,",
    b"=on",
    b'{"qom-type":"memory-backend-ram","id":"ram0","size":67108864}',
    b'"memdev":',
    b"1e999",
    b"[",
    b"{",
    b"\n-blockdev\n",
    b"\n-global\n",
    b"99999999999999999999T",
    b"0x",
)


def one_input(data: bytes) -> None:
    words = data.decode("utf-8", "surrogateescape").split("\n")
    with contextlib.suppress(UsageError):
        made = qemu_args.plan(words, BLOCKS, PATHS)
        assert all(isinstance(word, str) for word in made.arguments)
        shared = [backend.block.name for backend in made.backends]
        assert len(shared) == len(set(shared)), "a block stands for two back-ends"
