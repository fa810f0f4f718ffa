"""The floor: bare C loops on memory like the product's, in this process."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

from sharded_pc import shm
from sharded_pc.native.control import POOL_BYTES_PER_SHARD
from sharded_pc.native.floor import BareLoop
from sharded_pc.native.uffd import Uffd
from sharded_pc.shm import Segment
from sharded_pc.worker import MADV_NOHUGEPAGE

FILLING = 0xA5
"""Every byte of every tmp page: what a touched page must read."""


def punch(segment: Segment) -> None:
    """Drops all pages; the next access to each is a fault again."""
    segment.map.madvise(mmap.MADV_REMOVE)


@contextlib.contextmanager
def bare_loop(name: str, size: int) -> Iterator[tuple[BareLoop, Segment]]:
    """A loop over `size` bytes of POSIX shared memory, whose name is gone at once."""
    with contextlib.ExitStack() as stack:
        segment = Segment.create(f"/{name}{shm.POOL}", size)
        stack.callback(segment.close)
        segment.unlink()
        with contextlib.suppress(OSError):  # EINVAL: no transparent huge pages, which is as good
            segment.map.madvise(MADV_NOHUGEPAGE)
        pool = stack.enter_context(mmap.mmap(-1, POOL_BYTES_PER_SHARD))
        pool[:] = bytes([FILLING]) * len(pool)
        uffd = stack.enter_context(contextlib.closing(Uffd.open()))
        loop = BareLoop(segment.map, pool, uffd)
        stack.callback(loop.release)
        yield loop, segment


def names() -> Iterator[str]:
    """Names for shared memory that no other process uses."""
    number = 0
    while True:
        yield f"bench-{os.getpid()}-{number}"
        number += 1
