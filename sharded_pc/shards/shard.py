"""One shard as the coordinator sees it: it outlives its workers.

It remembers what its worker has to know (Step), and brings each successor there.  Before a
successor touches anything its predecessor was reaped, so no page has two writers.  What the dead
one had in its hands stands in shared memory (docs/architecture.md), or is asked for again.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable, Hashable
from errno import EAGAIN

from sharded_pc import threads
from sharded_pc.errors import ShardError
from sharded_pc.native.control import Control
from sharded_pc.shards.process import ShardProcess, WorkerDied
from sharded_pc.shards.roster import Roster
from sharded_pc.shards.step import Step

log = logging.getLogger(__name__)

DEATHS_MOST = 5
DEATHS_SECONDS = 10.0
"""A worker that dies so often will die again: somebody has to look at it."""


def _why(error: OSError) -> str:
    return f"{error.strerror}: {threads.REMEDY}" if error.errno == EAGAIN else str(error.strerror)


class Shard:
    """`on_restart()` is called when a successor serves, `on_trouble(error)` when none is tried any
    more, `on_guest_trouble(slot, text)` when a guest cannot be served."""

    def __init__(self, index: int, control: Control, roster: Roster) -> None:
        self.index = index
        self.on_restart: Callable[[], None] = lambda: None
        self.on_trouble: Callable[[ShardError], None] = lambda error: None
        self.on_guest_trouble: Callable[[int, str], None] = lambda slot, text: None
        self._control = control
        self._roster = roster
        self._wanted: dict[Hashable, Step] = {}
        self._deaths: collections.deque[float] = collections.deque(maxlen=DEATHS_MOST)
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        self._given_up = False
        self._present: asyncio.Future[ShardProcess] = self._loop.create_future()
        self._bringing = self._loop.create_task(self._bring(first=True))

    async def present(self) -> ShardProcess:
        """The worker, as soon as there is one; ShardError if none will come."""
        return await asyncio.shield(self._present)

    async def want(self, key: Hashable, step: Step) -> None:
        """The worker is told, and so is each successor; returns when one knows it, or when
        another step of that key has come in its place.  ShardError with the worker's reason."""
        self._wanted[key] = step
        while self._wanted.get(key) is step:
            process = await self.present()
            if step in process.done:
                return
            try:
                await process.do(step)
            except WorkerDied:
                continue

    async def drop(self, key: Hashable, release: bool) -> None:
        """Takes a guest's step back.  Until a worker has done so the guest is wanted: one that
        dies in the middle leaves its successor to do it whole."""
        try:
            while (step := self._wanted.get(key)) is not None:
                process = await self.present()
                try:
                    await process.tell("drop", step.slot, release)
                except WorkerDied:
                    continue
                return
        finally:
            self._wanted.pop(key, None)

    # Succession

    async def _bring(self, *, first: bool = False) -> None:
        """Brings a process without a shard to where it serves this one."""
        try:
            process = self._roster.take()
        except OSError as error:  # no memory, no descriptor, no process is to be had
            self._give_up(f"start a worker for shard {self.index}: {_why(error)}")
            return
        process.index = self.index
        process.on_end = self._on_end
        process.on_guest_trouble = self._tell_trouble
        if process.error is not None:  # before it was ours
            self._on_end(process)
            return
        try:
            await process.ready()
            await process.tell("shard", self.index)
            self._control.note_worker(self.index, process.pid)
            await self._tell_all(process)
        except WorkerDied:
            return  # _on_end knows
        except (ShardError, OSError) as error:
            process.kill(str(error))  # it lives, and cannot serve
            return
        if process.error is None:
            self._serve(process, first=first)

    def _tell_trouble(self, slot: int, text: str) -> None:
        self.on_guest_trouble(slot, text)

    async def _tell_all(self, process: ShardProcess) -> None:
        """Everything that is wanted, also what becomes so meanwhile."""
        while (step := self._first_unknown(process)) is not None:
            try:
                await process.do(step)
            except WorkerDied:
                raise
            except ShardError as error:
                if step.slot is None:
                    raise
                process.done.add(step)
                self._tell_trouble(step.slot, str(error))

    def _first_unknown(self, process: ShardProcess) -> Step | None:
        return next((step for step in self._wanted.values() if step not in process.done), None)

    def _serve(self, process: ShardProcess, *, first: bool) -> None:
        self._present.set_result(process)
        if not first:
            self._control.note_restart(self.index)
            self.on_restart()
            log.warning("shard %d is served by a new worker (pid %d)", self.index, process.pid)
        self._roster.serves(process)

    def _on_end(self, process: ShardProcess) -> None:
        """Nobody touches the shard's memory any more."""
        if self._stopping:
            return
        log.warning("%s", process.error)
        self._control.note_death(self.index)
        if self._present.done():
            self._present = self._loop.create_future()
        self._deaths.append(self._loop.time())
        if process.error.for_memory:
            self._give_up(str(process.error))
        elif self._dies_too_often():
            self._give_up(
                f"shard {self.index} lost {DEATHS_MOST} workers within {DEATHS_SECONDS:g} s: "
                f"{process.error}"
            )
        else:
            self._bringing = self._loop.create_task(self._bring())

    def _dies_too_often(self) -> bool:
        deaths = self._deaths
        return len(deaths) == DEATHS_MOST and deaths[-1] - deaths[0] < DEATHS_SECONDS

    def _give_up(self, why: str) -> None:
        self._given_up = True
        error = ShardError(why)
        self._control.note_failed(self.index, failed=True)
        self._end_present(error)
        self._roster.refill()
        self.on_trouble(error)

    def _end_present(self, error: ShardError) -> None:
        if self._present.done():
            self._present = self._loop.create_future()
        self._present.set_exception(error)
        self._present.exception()  # nobody may wait for it

    def revive(self) -> None:
        """If no successor was tried any more, one is."""
        if self._given_up:
            self._given_up = False
            self._deaths.clear()
            self._control.note_failed(self.index, failed=False)
            self._present = self._loop.create_future()
            self._bringing = self._loop.create_task(self._bring())

    async def stop(self) -> None:
        """No successor from now on; the roster ends the processes."""
        self._stopping = True
        self._bringing.cancel()
        self._end_present(ShardError(f"shard {self.index} has no worker any more"))
        await asyncio.gather(self._bringing, return_exceptions=True)
