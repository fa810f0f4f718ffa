"""A guest for demos, tests and benchmarks: visits pages, checks them, rewrites some.

It is a process on the RAM, not a VM.  The visiting itself runs in C without the GIL.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from array import array

from sharded_pc.attach.client import Guest
from sharded_pc.native import oracle
from sharded_pc.testing.oracle import GUEST, PageOracle


class WrongPage(AssertionError):
    """A guest read what the source did not have there."""


@dataclasses.dataclass
class Visit:
    """What a visit of the whole RAM found; latencies are nanoseconds of each first touch."""

    pages: int
    written: int
    latencies: array


class Visitor:
    """Visits every page of an attached guest's RAM once, in random order, with `threads` threads,
    rewriting `write_share` of them; afterwards `expected` says what each block holds."""

    def __init__(self, guest: Guest, pages: PageOracle, write_share: float = 0.2) -> None:
        self._guest = guest
        self._oracle = pages
        self._random = random.Random(f"{pages.seed}/guest")
        count = range(len(pages.blocks))
        self.expected = [bytearray(pages.final(block)) for block in count]
        self._write = [self._choose(block, write_share) for block in count]

    def _choose(self, block: int, share: float) -> bytes:
        pages = self._oracle.blocks[block].pages
        return bytes(GUEST if self._random.random() < share else oracle.KEEP for _ in range(pages))

    def visit(self, threads: int = 2) -> Visit:
        """WrongPage names the first wrong one."""
        result = Visit(0, 0, array("Q"))
        for block in range(len(self._oracle.blocks)):
            self._visit_block(block, threads, result)
        return result

    def _visit_block(self, block: int, threads: int, result: Visit) -> None:
        order = list(range(self._oracle.blocks[block].pages))
        self._random.shuffle(order)
        failures: list[WrongPage] = []

        def work(part: array) -> None:
            try:
                result.latencies.extend(self._visit_part(block, part))
            except WrongPage as error:
                failures.append(error)

        workers = [
            threading.Thread(target=work, args=(array("Q", order[i::threads]),))
            for i in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]
        self._note_writes(block)
        result.pages += len(order)
        result.written += len(order) - self._write[block].count(oracle.KEEP)

    def _visit_part(self, block: int, part: array) -> array:
        name = self._oracle.blocks[block].name
        memory, expected = self._guest.blocks[name], bytes(self.expected[block])
        right, times = oracle.visit(
            memory, self._oracle.seed, block, part, expected, self._write[block], latencies=True
        )
        if right < len(part):
            raise WrongPage(
                f"page {part[right]} of block {name!r} is not version {expected[part[right]]}"
            )
        return times

    def _note_writes(self, block: int) -> None:
        for page, version in enumerate(self._write[block]):
            if version != oracle.KEEP:
                self.expected[block][page] = version

    def check(self) -> None:
        """Every page of every block is as it should be now; WrongPage."""
        for block, expected in enumerate(self.expected):
            name = self._oracle.blocks[block].name
            wrong = self._oracle.first_wrong(block, self._guest.blocks[name], bytes(expected))
            if wrong is not None:
                raise WrongPage(f"page {wrong} of block {name!r} is not version {expected[wrong]}")
