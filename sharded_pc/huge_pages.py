"""How much of a receiver's RAM is mapped by huge pages: by itself and by its guests."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection

from sharded_pc.memory import GuestMemory
from sharded_pc.observe.memory import huge_bytes
from sharded_pc.populate import Populator

SETTLE_SECONDS = 2.0
"""How long the report of a migration into huge pages waits for guests to map them whole."""


class HugePages:
    """Of RAM that the receiver maps through `populator` (`continue`; with `copy` it maps none)."""

    def __init__(self, memory: GuestMemory, populator: Populator) -> None:
        self._memory = memory
        self._populator = populator

    def _bytes(self, pid: int) -> int:
        return huge_bytes(pid, [os.fstat(block.fd).st_ino for block in self._memory.blocks])

    def here(self) -> bool:
        """The RAM stands on huge pages, at least in part."""
        return bool(self._populator.aliases) and self._bytes(os.getpid()) > 0

    def mapped(self, guests: Collection[int]) -> dict[str, int] | None:
        """Bytes that the receiver, and the guests of these pids together, have mapped by huge
        pages; None where the receiver does not map the RAM."""
        if not self._populator.aliases:
            return None
        return {"receiver": self._bytes(os.getpid()), "guests": sum(map(self._bytes, guests))}

    async def settle(self, guests: Collection[int]) -> None:
        """Gives guests a moment to map huge pages whole, so that the report can tell."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while guests and time.monotonic() < deadline:
            huge = self.mapped(guests)
            if huge is None or huge["guests"] >= huge["receiver"]:
                return
            await asyncio.sleep(0.02)
