"""The shards of one receiver as the coordinator sees them.

``process.py``   one worker process: tell, kill, notice its end
``roster.py``    all of them, and spares
``watch.py``     finds those that live and do not go on
``shard.py``     one shard, which outlives its workers: succession
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable

from sharded_pc.errors import ShardError
from sharded_pc.memory import GuestMemory
from sharded_pc.native.guests import Guests
from sharded_pc.shards.roster import Roster
from sharded_pc.shards.shard import Shard
from sharded_pc.shards.step import Step
from sharded_pc.shards.watch import Watch

__all__ = ["Shards"]


class Shards:
    """All shards of one receiver; `guests` is the stream's thread's table of guests, which changes
    with theirs.  `on_restart()`, `on_trouble(error)` and `on_guest_trouble(slot, text)` are of all
    of them."""

    def __init__(self, memory: GuestMemory, count: int, guests: Guests) -> None:
        self.guests = guests
        self.on_restart: Callable[[], None] = lambda: None
        self.on_trouble: Callable[[ShardError], None] = lambda error: None
        self.on_guest_trouble: Callable[[int, str], None] = lambda slot, text: None
        self._control = memory.control
        self._roster = Roster(memory.name, count)
        self._shards = [Shard(index, memory.control, self._roster) for index in range(count)]
        for shard in self._shards:
            shard.on_restart = lambda: self.on_restart()
            shard.on_trouble = lambda error: self.on_trouble(error)
            shard.on_guest_trouble = lambda slot, text: self.on_guest_trouble(slot, text)
        self._fds: dict[str, int] = {}
        watch = Watch(lambda: self._roster.living, memory.control)
        self._watching = asyncio.create_task(watch.run())

    async def ready(self) -> None:
        """Every shard has a worker; ShardError."""
        await _all(shard.present() for shard in self._shards)

    def keep_spares(self) -> None:
        """From now on workers' successors wait for their death."""
        self._roster.keep_spares()

    @property
    def spare_pids(self) -> list[int]:
        """Of those that are ready."""
        return [process.pid for process in self._roster.spares]

    def pids(self) -> list[int]:
        """Of each shard's worker, the last one where there is none now."""
        return [shard.pid for shard in self._control.shards()]

    async def tell(self, word: str, *arguments: object, fd: int = -1) -> None:
        """Tells all workers, and each of their successors, waits for all; the first ShardError.
        Each gets a copy of `fd`, which stays the caller's.  What was told by the same word
        before holds no more."""
        old = self._fds.pop(word, -1)
        if fd >= 0:
            fd = self._fds[word] = os.dup(fd)
        try:
            await _all(shard.want(word, Step(word, arguments, fd)) for shard in self._shards)
        finally:
            if old >= 0:
                os.close(old)

    async def add_guest(self, slot: int, addresses: list[int], mode: int, uffds: list[int]) -> None:
        """Each worker gets its shard's userfaultfd; the first ShardError."""
        own = self.guests.add(slot, uffds, addresses)
        await _all(
            shard.want(("guest", slot), Step("guest", (slot, addresses, mode), fd, slot))
            for shard, fd in zip(self._shards, own, strict=True)
        )

    async def drop_guest(self, slot: int, release: bool) -> None:
        try:
            await _all(shard.drop(("guest", slot), release) for shard in self._shards)
        finally:
            self.guests.drop(slot)

    async def give_channel(self, number: int, fd: int, record: str | None = None) -> int:
        """A worker receives a channel of multifd, from a copy of `fd`, and writes it down in the
        file `record`; its pid.  No successor goes on with it.  ShardError."""
        process = await self._shards[number % len(self._shards)].present()
        await process.tell("channel", number, record, fd=fd)
        return process.pid

    def revive(self) -> None:
        """Shards that were given up (`on_trouble`) get a successor after all."""
        for shard in self._shards:
            shard.revive()

    async def stop(self) -> None:
        """Ends all workers; a second call does nothing."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.gather(*(shard.stop() for shard in self._shards))
        await self._roster.stop()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


async def _all(told: Iterable[Coroutine]) -> None:
    """Waits for all of them, then raises the first one's error."""
    for outcome in await asyncio.gather(*told, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
