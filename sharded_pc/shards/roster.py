"""All worker processes of a receiver, and those that wait for the day they are needed.

Starting a process takes longer than a guest should wait, so spares are kept: they have imported
everything and opened the memory.  All workers may die at once, so there is one for each shard.
None is started while a guest may wait: not before the receiver listens, not while a successor is
on its way, and never two at a time.
"""

from __future__ import annotations

import asyncio
import logging

from sharded_pc.errors import ShardError
from sharded_pc.shards.process import ShardProcess

log = logging.getLogger(__name__)

SPARES_MOST = 16
"""Each takes 12 MiB of memory and four of the coordinator's descriptors, of which it often has no
more than 1024; who has more workers has the processors to start the rest side by side."""
CALM_SECONDS = 0.1
"""Before each start: who dies seldom dies alone, and guests that waited catch up."""
SPARE_AGAIN_SECONDS = 1.0
"""After a spare has died: nobody waits for it."""


class Roster:
    """`living`: processes that have not ended, the spares among them."""

    def __init__(self, memory_name: str, shards: int) -> None:
        self._memory_name = memory_name
        self._most = min(shards, SPARES_MOST)
        self._living: set[ShardProcess] = set()
        self._spares: list[ShardProcess] = []
        self._coming: set[ShardProcess] = set()
        """taken, and do not serve yet"""
        self._wanted = asyncio.Event()
        """a spare is missing, and nobody waits for a successor"""
        self._keeping: asyncio.Task | None = None

    @property
    def living(self) -> tuple[ShardProcess, ...]:
        return tuple(process for process in self._living if process.error is None)

    @property
    def spares(self) -> tuple[ShardProcess, ...]:
        """Those that may be told something at once."""
        return tuple(process for process in self._spares if process.is_ready)

    def take(self) -> ShardProcess:
        """A process without a shard, which may not be ready yet: a spare, or a new one.  The caller
        says when it serves, or that none will come (`refill`).  OSError."""
        process = next(iter(self.spares or self._spares), None)
        if process is None:
            process = self._start()
        else:
            self._spares.remove(process)
        self._coming.add(process)
        self._look()
        return process

    def _start(self) -> ShardProcess:
        self._living = {process for process in self._living if process.error is None}
        process = ShardProcess(self._memory_name)
        self._living.add(process)
        return process

    def serves(self, process: ShardProcess) -> None:
        self._coming.discard(process)
        self._look()

    def refill(self) -> None:
        """Somebody is waited for no more."""
        self._look()

    def keep_spares(self) -> None:
        """From now on, one after the other, and others in the place of those that are taken."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())

    def _look(self) -> None:
        self._coming = {process for process in self._coming if process.error is None}
        if len(self._spares) < self._most and not self._coming:
            self._wanted.set()
        else:
            self._wanted.clear()

    async def _keep(self) -> None:
        self._look()
        while True:
            await self._wanted.wait()
            await asyncio.sleep(CALM_SECONDS)
            if self._wanted.is_set():
                await self._add()

    async def _add(self) -> None:
        try:
            spare = self._start()
        except OSError as error:
            log.warning("no spare worker can be started: %s", error.strerror)
            self._look_later()
            return
        spare.on_end = self._on_spare_end
        self._spares.append(spare)
        self._look()
        try:
            await spare.ready()
        except ShardError as error:
            spare.kill(str(error))

    def _on_spare_end(self, process: ShardProcess) -> None:
        log.warning("a spare worker is gone: %s", process.error)
        self._spares.remove(process)
        self._look_later()

    def _look_later(self) -> None:
        self._wanted.clear()
        asyncio.get_running_loop().call_later(SPARE_AGAIN_SECONDS, self._look)

    async def stop(self) -> None:
        """Ends all of them."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await asyncio.gather(*(process.stop() for process in self.living))
