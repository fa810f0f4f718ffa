"""Pages that must be here before a guest may run, though nobody has faulted on them: those of
blocks that a destination keeps in memory of its own, and those that a discard's punch left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from sharded_pc.memory import GuestMemory

LOOK_SECONDS = 0.001
"""The placing processes have no way to call us."""

Span = tuple[int, int, int]
"""Block, first page, pages."""


class AwaitedPages:
    """Spans of missing pages, asked for and waited for once."""

    def __init__(self, memory: GuestMemory, spans: Iterable[Span]) -> None:
        self._memory = memory
        self._spans = list(spans)

    def __len__(self) -> int:
        """Pages."""
        return sum(pages for _, _, pages in self._spans)

    async def arrive(self, ask: Callable[[], None]) -> None:
        """Marks them as requested, has the source asked by `ask()`, and returns when all are here.
        The caller sets the time limit."""
        for block, page, pages in self._spans:
            self._memory.requested.set(self._bit(block, page), pages)
        ask()
        while not all(map(self._is_here, self._spans)):
            await asyncio.sleep(LOOK_SECONDS)

    def _is_here(self, span: Span) -> bool:
        block, page, pages = span
        return self._memory.received.count(self._bit(block, page), pages) == pages

    def _bit(self, block: int, page: int) -> int:
        return self._memory.control.block(block)[2] + page


def unpunched(memory: GuestMemory) -> AwaitedPages:
    """What discards left in memory: huge pages of /dev/shm that somebody uses."""
    spans: list[Span] = []
    if any(shard.unpunched for shard in memory.control.shards()):
        for block in range(len(memory.blocks)):
            spans += [(block, page, pages) for page, pages in memory.unpunched(block)]
    return AwaitedPages(memory, spans)
