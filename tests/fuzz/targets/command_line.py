"""A QEMU command line, one word a line: what is asked of it is answered, or UsageError."""

from __future__ import annotations

import contextlib

from sharded_pc import address, qemu_args
from sharded_pc.errors import UsageError
from sharded_pc.geometry import RamBlock
from sharded_pc.qemu_args import management

BLOCKS = (
    RamBlock("pc.ram", 256 << 20),
    RamBlock("ram0", 64 << 20),
    RamBlock("ram1", 64 << 20),
    RamBlock("pc.bios", 256 << 10),
)
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
    b"\n-incoming\ndefer",
    b"\n-name\nguest=g,debug-threads=on",
    b"\n-chardev\nsocket,id=m,fd=3,server=on,wait=off\n-mon\nchardev=m,mode=control",
    b"99999999999999999999T",
    b"0x",
)


def one_input(data: bytes) -> None:
    words = data.decode("utf-8", "surrogateescape").split("\n")
    with contextlib.suppress(UsageError):
        plan(words)
    with contextlib.suppress(UsageError):
        assert isinstance(management.guest_name(words), str)
        address.parse(management.incoming(words))
        deferred = management.deferred(words)
        assert management.monitor_listener(deferred) is None or plan(deferred)


def plan(words: list[str]) -> tuple[str, ...]:
    own = qemu_args.backends(words)
    paths = {each.name: f"/dev/shm/guest.{each.name}" for each in own}
    assert len(paths) == len(own), "two backends of one id"
    made = qemu_args.plan(words, paths)
    assert all(isinstance(word, str) for word in made)
    shared = [backend.block.name for backend in qemu_args.match(words, BLOCKS)]
    assert len(shared) == len(set(shared)), "a block stands for two backends"
    return made
