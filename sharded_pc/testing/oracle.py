"""What every page of a synthetic guest holds, before and after its source's last run."""

from __future__ import annotations

import dataclasses
import functools
import random
from array import array
from collections.abc import Iterator, Sequence

from sharded_pc.geometry import RamBlock
from sharded_pc.native import oracle

PRECOPIED, DIRTIED, GUEST = 1, 2, 100
"""Versions of a page: as the first pass sends it, as the source left it, as a guest rewrote it."""


@dataclasses.dataclass(frozen=True)
class PageOracle:
    """Versions of all pages of all blocks, from one seed: source and guest agree without a word.

    `zero_share` of the pages are zeros for ever; `dirty_share` of the pages change after they were
    precopied, so that the receiver must discard them.
    """

    blocks: tuple[RamBlock, ...]
    seed: int = 1
    zero_share: float = 0.1
    dirty_share: float = 0.8

    @functools.cache  # noqa: B019  (a handful of oracles in a process's life)
    def precopied(self, block: int) -> bytes:
        """Version of each page during precopy; 0 is a zero page."""
        chance = random.Random(f"{self.seed}/{block}/zero")
        share = self.zero_share
        pages = self.blocks[block].pages
        return bytes(0 if chance.random() < share else PRECOPIED for _ in range(pages))

    @functools.cache  # noqa: B019
    def final(self, block: int) -> bytes:
        """Version of each page when the source stopped."""
        chance = random.Random(f"{self.seed}/{block}/dirty")
        return bytes(
            DIRTIED if chance.random() < self.dirty_share else old for old in self.precopied(block)
        )

    def page(self, block: int, page: int, version: int) -> bytes:
        """The 4096 bytes."""
        return oracle.fill(self.seed, block, page, version)

    def records(
        self, block: int, pages: Sequence[int], versions: bytes, *, go_on: bool = False
    ) -> bytes:
        """RAM records for pages; `go_on`: the block was named before."""
        name = self.blocks[block].name
        return oracle.records(name, self.seed, block, pages, versions, go_on=go_on)

    def first_wrong(self, block: int, memory, versions: bytes) -> int | None:
        """The first page of a whole block that is not as `versions` says, or None."""
        everything = array("Q", range(self.blocks[block].pages))
        right, _ = oracle.visit(memory, self.seed, block, everything, versions)
        return None if right == len(everything) else right


def runs(flags: bytes | bytearray, wanted: int = 1) -> Iterator[tuple[int, int]]:
    """(first, count) of each stretch of `wanted` in a byte per page."""
    other = bytes([1 - wanted])
    mark = bytes([wanted])
    at = flags.find(mark)
    while at >= 0:
        end = flags.find(other, at)
        end = len(flags) if end < 0 else end
        yield at, end - at
        at = flags.find(mark, end)
