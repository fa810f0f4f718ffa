"""Why something ends before it is complete: the first trouble, or a wish."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from sharded_pc.errors import Cancelled, ShardedPcError
from sharded_pc.native.ram import Stop


class Ending:
    """A receiver's, or a connection's `within` it, which ends with it.

    Told from the loop; the stream's thread sees `stop`, coroutines wait by `unless_over`.
    """

    def __init__(self, within: Ending | None = None) -> None:
        self.stop = Stop()
        self.trouble: ShardedPcError | None = None
        self._over = asyncio.Event()
        self._within = within
        self._inner: list[Ending] = []
        if within is not None:
            within._inner.append(self)
            if within.is_over:
                self.because(within.reason)

    def because(self, error: ShardedPcError) -> None:
        """The first reason counts."""
        self.trouble = self.trouble or error
        self.stop.set()
        self._over.set()
        for each in self._inner:
            each.because(error)

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    @property
    def reason(self) -> ShardedPcError:
        return self.trouble or Cancelled("ended before a source connected")

    async def unless_over(self, wanted: Coroutine):
        """The result of `wanted`; what ended this if that comes first."""
        task = asyncio.ensure_future(wanted)
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self.reason
        finally:
            task.cancel()
            over.cancel()
            # What follows may be the end of what the task works with.
            await asyncio.gather(task, over, return_exceptions=True)

    def close(self) -> None:
        """Nobody uses `stop` any more."""
        if self._within is not None:
            self._within._inner.remove(self)
        self.stop.close()
