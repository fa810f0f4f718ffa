"""Finds workers that live and do not go on.

A worker that was stopped is seen at the next look.  One whose placement loop gives no sign of life
is woken; if it then still sleeps, or is held, it will never go on.  If it wants to run, or is at
work in the kernel, it is given time: a loaded machine must not cost healthy workers.  What is
found is killed, and its death is everybody else's business.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol
from weakref import WeakKeyDictionary

from sharded_pc.shards.process import ShardProcess

LOOK_SECONDS = 0.05
"""A good part of what a guest may wait for a successor."""
NUDGE_SECONDS = 0.15
"""More than a placement loop sleeps that has nothing to do (native/shard/place.c, IDLE_MS)."""
HANG_SECONDS = 0.2
"""One look after the nudge, which makes a thread that sleeps one that wants to run, wherever its
processor is."""
BUSY_SECONDS = 2.0
"""Who wants to run may lack the processor, which another worker would lack as well; who is in the
kernel may punch a large range or wait for memory."""
STOPPED_OURSELVES_SECONDS = 0.5
"""So late we are only if we were stopped too: workers that were stopped with us (^Z) go on soon."""


class Pulse(Protocol):
    """Of the shards' placement loops (native.control.Control)."""

    def beats(self, index: int) -> int:
        """A number that changes while the loop goes on."""

    def nudge(self, index: int) -> None:
        """It beats, if it sleeps."""


@dataclasses.dataclass(slots=True)
class _Seen:
    beats: int
    has_begun: bool = False
    """a new thread may wait for the GIL, asleep, before its first beat"""
    silent: int = 0
    """looks without a beat"""


class Watch:
    def __init__(self, living: Callable[[], Iterable[ShardProcess]], pulse: Pulse) -> None:
        self._living = living
        self._pulse = pulse
        self._seen: WeakKeyDictionary[ShardProcess, _Seen] = WeakKeyDictionary()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            since = loop.time()
            await asyncio.sleep(LOOK_SECONDS)
            self.look(loop.time() - since - LOOK_SECONDS)
            for process in self._living():
                process.oom.look()

    def look(self, late: float) -> None:
        """`late`: seconds for which nobody looked; they count for nobody."""
        for process in self._living():
            if process.is_stopped():
                if late < STOPPED_OURSELVES_SECONDS:
                    process.kill("it was stopped (SIGSTOP)")
            elif process.placing:
                self._listen(process)

    def _listen(self, process: ShardProcess) -> None:
        assert process.index is not None
        seen = self._note(process, self._pulse.beats(process.index))
        silent = seen.silent * LOOK_SECONDS
        if silent >= BUSY_SECONDS or (silent >= HANG_SECONDS and self._hangs(process)):
            process.kill(f"it hung, no sign of life for {silent:.1f} s")
        elif silent >= NUDGE_SECONDS:
            self._pulse.nudge(process.index)

    def _hangs(self, process: ShardProcess) -> bool:
        """It was woken, and sleeps again without a beat in between.  That it sleeps is asked first:
        we may lack the processor between the two questions."""
        assert process.index is not None
        seen = self._seen[process]
        sleeps = process.sleeps()
        return sleeps and seen.has_begun and self._pulse.beats(process.index) == seen.beats

    def _note(self, process: ShardProcess, beats: int) -> _Seen:
        seen = self._seen.setdefault(process, _Seen(beats))
        if seen.beats != beats:
            seen.beats, seen.has_begun, seen.silent = beats, True, 0
        else:
            seen.silent += 1
        return seen
