"""All worker processes of a receiver, and one that waits for the day it is needed.

Starting a process takes longer than a guest should wait, so a spare is kept: it has imported
everything and opened the memory.  Who takes it asks for another one when guests are served again.
"""

from __future__ import annotations

import asyncio
import logging

from sharded_pc.shards.process import ShardProcess

log = logging.getLogger(__name__)

SPARE_AGAIN_SECONDS = 1.0
"""After a spare has died: nobody waits for it."""


class Roster:
    """`living`: processes that have not ended, the spare among them."""

    def __init__(self, memory_name: str) -> None:
        self._memory_name = memory_name
        self._living: set[ShardProcess] = set()
        self._spare: ShardProcess | None = None
        self._keeps_spare = False
        self._again: asyncio.TimerHandle | None = None

    @property
    def living(self) -> tuple[ShardProcess, ...]:
        return tuple(process for process in self._living if process.error is None)

    @property
    def spare(self) -> ShardProcess | None:
        return self._spare

    def take(self) -> ShardProcess:
        """A process without a shard, which may not be ready yet: the spare, or a new one.
        OSError."""
        process, self._spare = self._spare, None
        return process or self._start()

    def _start(self) -> ShardProcess:
        self._living = {process for process in self._living if process.error is None}
        process = ShardProcess(self._memory_name)
        self._living.add(process)
        return process

    def keep_spare(self) -> None:
        """There is one from now on, and another one after it was taken, as soon as this is called
        again."""
        self._keeps_spare = True
        self._fill()

    def refill(self) -> None:
        if self._keeps_spare:
            self._fill()

    def _fill(self) -> None:
        if self._spare is not None:
            return
        try:
            self._spare = self._start()
        except OSError as error:
            log.warning("no spare worker can be started: %s", error.strerror)
            self._fill_later()
        else:
            self._spare.on_end = self._on_spare_end

    def _on_spare_end(self, process: ShardProcess) -> None:
        log.warning("the spare worker is gone: %s", process.error)
        self._spare = None
        self._fill_later()

    def _fill_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._again = loop.call_later(SPARE_AGAIN_SECONDS, self.refill)

    async def stop(self) -> None:
        """Ends all of them."""
        self._keeps_spare, self._spare = False, None
        if self._again is not None:
            self._again.cancel()
        await asyncio.gather(*(process.stop() for process in self.living))
