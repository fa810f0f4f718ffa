"""Why a receiver ends before its migration has completed: the first trouble, or a wish."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from sharded_pc.errors import Cancelled, ShardedPcError
from sharded_pc.native.ram import Stop


class Ending:
    """Told from the loop; the stream's thread sees `stop`, coroutines wait by `unless_over`."""

    def __init__(self) -> None:
        self.stop = Stop()
        self.trouble: ShardedPcError | None = None
        self._over = asyncio.Event()

    def because(self, error: ShardedPcError) -> None:
        """The first reason counts."""
        self.trouble = self.trouble or error
        self.stop.set()
        self._over.set()

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    async def unless_over(self, wanted: Coroutine):
        """The result of `wanted`; what ended the receiver if that comes first."""
        task = asyncio.ensure_future(wanted)
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self.trouble or Cancelled("ended before a source connected")
        finally:
            task.cancel()
            over.cancel()
            # What follows may be the end of what the task works with.
            await asyncio.gather(task, over, return_exceptions=True)

    def close(self) -> None:
        self.stop.close()
