"""Finds workers that live and do not go on.

A worker that was stopped is seen at the next look.  One that hangs (its placement loop gives no
sign of life) is given time: a loaded machine must not cost healthy workers.  What is found is
killed, and its death is everybody else's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

from sharded_pc.shards.process import ShardProcess

LOOK_SECONDS = 0.05
"""A good part of what a guest may wait for a successor."""
HANG_SECONDS = 2.0
"""Twenty beats of a placement loop that has nothing to do."""
STOPPED_OURSELVES_SECONDS = 0.5
"""So late we are only if we were stopped too: workers that were stopped with us (^Z) go on soon."""


class Watch:
    """`beats(index)` is a number that changes while the shard's worker goes on."""

    def __init__(
        self, living: Callable[[], Iterable[ShardProcess]], beats: Callable[[int], int]
    ) -> None:
        self._living = living
        self._beats = beats
        self._seen: WeakKeyDictionary[ShardProcess, tuple[int, float]] = WeakKeyDictionary()
        """the last beat of each, and how long it has not changed"""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            since = loop.time()
            await asyncio.sleep(LOOK_SECONDS)
            self.look(loop.time() - since - LOOK_SECONDS)

    def look(self, late: float) -> None:
        """`late`: seconds for which nobody looked; they count for nobody."""
        for process in self._living():
            if process.is_stopped():
                if late < STOPPED_OURSELVES_SECONDS:
                    process.kill("it was stopped (SIGSTOP)")
            elif process.places and self._silence(process) > HANG_SECONDS:
                process.kill(f"it hung, no sign of life for {HANG_SECONDS:g} s")

    def _silence(self, process: ShardProcess) -> float:
        assert process.index is not None
        beats = self._beats(process.index)
        before, silent = self._seen.get(process, (beats, 0.0))
        silent = silent + LOOK_SECONDS if beats == before else 0.0
        self._seen[process] = beats, silent
        return silent
