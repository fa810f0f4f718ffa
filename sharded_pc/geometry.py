"""RAMBlocks, stripes and shards: frozen values and pure arithmetic.

A RAMBlock is cut into *stripes*, dealt round-robin to shards: stripe number s of the whole guest
(blocks in stream order, each starting a new stripe) belongs to shard ``s % shards``.  The C core
computes the same (control.h, sp_shard_of); tests hold the two together.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence

PAGE_BYTES = 4096
"""Target and host page size (x86); other sizes are refused by name."""

MAX_SOURCE_PAGE_BYTES = 1 << 30
"""The largest page of x86's hugetlbfs, and the most that one request may ask for (QEMU reads an
int)."""

MIN_STRIPE_BYTES = 2 << 20
"""A sequential stream fills one stripe after the other, so stripes must be small against what a
shard can queue; 2 MiB keeps a huge page in one shard.  docs/design-notes.md has the measurement."""

MAX_STRIPES = 8192
"""Every stripe is a VMA in each guest: far below vm.max_map_count's default of 65530."""


class Placement(enum.StrEnum):
    """How a page becomes visible to guests (design-notes.md compares them)."""

    COPY = "copy"
    """UFFDIO_COPY from tmp pages; guests register MISSING"""
    CONTINUE = "continue"
    """received straight into the RAMBlock, then UFFDIO_CONTINUE; guests register MISSING | MINOR"""


@dataclasses.dataclass(frozen=True, slots=True)
class RamBlock:
    """One RAMBlock of the source, as its block list names it."""

    name: str
    """idstr, 1..255 bytes"""
    size: int
    """used_length in bytes, a multiple of page_size"""
    page_size: int = PAGE_BYTES
    """bytes, here"""
    source_page_size: int = PAGE_BYTES
    """bytes; more than page_size if the source's memory is hugetlbfs: the source discards, is asked
    for and sends such pages whole, here each page_size of them is visible as it arrives"""

    @property
    def pages(self) -> int:
        return self.size // self.page_size


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of one block that belongs to one shard; bytes."""

    block: str
    offset: int
    size: int
    shard: int


def default_stripe_bytes(total: int) -> int:
    """The stripe size for `total` bytes of RAM: a power of two, at least MIN_STRIPE_BYTES, giving
    at most MAX_STRIPES stripes (one more per block)."""
    stripe = MIN_STRIPE_BYTES
    while total > stripe * MAX_STRIPES:
        stripe *= 2
    return stripe


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """The guest's RAM and how it is dealt to shards."""

    blocks: tuple[RamBlock, ...]
    shards: int
    stripe_bytes: int

    @classmethod
    def of(
        cls, blocks: Sequence[RamBlock], shards: int, stripe_bytes: int | None = None
    ) -> Geometry:
        total = sum(block.size for block in blocks)
        return cls(tuple(blocks), shards, stripe_bytes or default_stripe_bytes(total))

    @property
    def total(self) -> int:
        """Bytes of RAM."""
        return sum(block.size for block in self.blocks)

    @property
    def stripe_pages(self) -> int:
        return self.stripe_bytes // PAGE_BYTES

    def block(self, name: str) -> RamBlock:
        """The named block; KeyError."""
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    def index(self, name: str) -> int:
        """Position of the named block; KeyError."""
        return self.blocks.index(self.block(name))

    def extents(self) -> Iterator[Extent]:
        """Every stripe of every block, in order."""
        number = 0
        for block in self.blocks:
            for offset in range(0, block.size, self.stripe_bytes):
                size = min(self.stripe_bytes, block.size - offset)
                yield Extent(block.name, offset, size, number % self.shards)
                number += 1

    def shard_of(self, name: str, page: int) -> int:
        """The shard that owns a page (index within its block)."""
        stripe = 0
        for block in self.blocks:
            if block.name == name:
                return (stripe + page // self.stripe_pages) % self.shards
            stripe += -(-block.size // self.stripe_bytes)
        raise KeyError(name)
