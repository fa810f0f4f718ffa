"""A guest process that touches pages when told to and says how long each took."""

from __future__ import annotations

import mmap
import random
from array import array
from multiprocessing.connection import Connection

from sharded_pc import processes
from sharded_pc.errors import GuestLost, ShardedPcError
from sharded_pc.native import floor
from sharded_pc.native.floor import Touched

ANSWER_SECONDS = 300.0
FORGET = "forget"


def order_of(pages: int, seed: int) -> array:
    """All pages in a random order: the same in every process."""
    order = list(range(pages))
    random.Random(seed).shuffle(order)
    return array("Q", order)


def regions(pages: int, threads: int) -> array:
    """All pages so that each of `threads` touchers, who take every so-many'th of them, has a region
    of its own and walks through it: the layout of the kernel's demand_paging_test."""
    order, first = array("Q", bytes(8 * pages)), 0
    for thread in range(threads):
        mine = len(range(thread, pages, threads))
        order[thread::threads] = array("Q", range(first, first + mine))
        first += mine
    return order


def _guest(conn: Connection, path: str, block: str) -> None:
    """The process: (seed, threads, expected, first, count) is answered by (ns, latencies) or a
    text, FORGET by itself."""
    import sharded_pc

    with sharded_pc.attach(path, timeout=ANSWER_SECONDS) as guest:
        conn.send("attached")
        memory = guest.blocks[block]
        while (command := conn.recv()) is not None:
            conn.send(_forget(memory) if command == FORGET else _touch(memory, *command))


def _forget(memory: memoryview) -> str:
    """Drops this process's page tables; the memory itself stays."""
    assert isinstance(memory.obj, mmap.mmap)
    memory.obj.madvise(mmap.MADV_DONTNEED)
    return FORGET


def _touch(
    memory: memoryview, seed: int | None, threads: int, expected: int, first: int, count: int | None
) -> object:
    count = len(memory) // floor.PAGE_BYTES - first if count is None else count
    pages = regions(count, threads) if seed is None else order_of(count, seed)
    part = memory[first * floor.PAGE_BYTES :]
    try:
        touched = floor.touch(part, pages, threads, expected)
    except ShardedPcError as error:
        return str(error)
    return touched.ns, touched.latencies


class GuestProcess:
    """The parent's end.  Its methods block."""

    def __init__(self, path: str, block: str) -> None:
        self._process, self._conn = processes.start(
            _guest, path, block, name="bench-guest", daemon=True
        )

    def _answer(self) -> object:
        try:
            if self._conn.poll(ANSWER_SECONDS):
                return self._conn.recv()
        except (EOFError, ConnectionResetError):
            raise GuestLost("the benchmark's guest process died") from None
        raise GuestLost(f"the benchmark's guest said nothing for {ANSWER_SECONDS:.0f} s")

    def wait_attached(self) -> None:
        """Returns when memory may be touched; GuestLost."""
        self._answer()

    def forget(self) -> None:
        """Every page that is in memory faults once more; GuestLost."""
        self._conn.send(FORGET)
        self._answer()

    def touch(
        self, seed: int | None, threads: int, expected: int, first: int = 0,
        count: int | None = None,
    ) -> Touched:  # fmt: skip
        """Touches `count` pages (None: all) from `first` on once, in order_of(seed) or (None) in
        regions(threads); GuestLost."""
        self._conn.send((seed, threads, expected, first, count))
        answer = self._answer()
        if isinstance(answer, str):
            raise GuestLost(answer)
        return Touched(*answer)  # type: ignore[misc]

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Ends it, however busy it is."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._conn.close()
