"""A process that has nearly as many mappings as vm.max_map_count allows: its next ones are ENOMEM.

    python -m tests.few_maps NAME LEFT

says what becomes of a worker for the memory NAME there.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

from sharded_pc.errors import ShardedPcError
from sharded_pc.geometry import Geometry, Placement
from sharded_pc.memory import GuestMemory
from sharded_pc.worker import ShardWorker
from tests.synthetic import BLOCKS, STRIPE_BYTES

PAGE = mmap.PAGESIZE


@contextlib.contextmanager
def few_maps(left: int) -> Iterator[None]:
    """About `left` mappings can still be made; two more for each page whose protection is another
    one than its neighbours'."""
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    at = libc.mmap(None, ctypes.c_size_t(2 * most * PAGE), mmap.PROT_READ, flags, -1, 0)
    page = 1
    while libc.mprotect(ctypes.c_void_p(at + page * PAGE), PAGE, 0) == 0:
        page += 2
    for back in range(page - 2, page - 2 - left, -2):
        libc.mprotect(ctypes.c_void_p(at + back * PAGE), PAGE, mmap.PROT_READ)
    try:
        yield
    finally:
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(2 * most * PAGE))


def main(name: str, left: str) -> None:
    memory = GuestMemory.create(name, 2)
    try:
        memory.define(Geometry.of(BLOCKS, 2, STRIPE_BYTES), Placement.COPY)
        worker = ShardWorker(GuestMemory.open(name), 0)
        with few_maps(int(left)):
            try:
                worker.geometry()
                said = "it works"
            except ShardedPcError as error:
                said = str(error)
        print(said)
    finally:
        memory.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
