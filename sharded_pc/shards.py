"""The worker processes as the coordinator sees them: start, tell, notice death."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from multiprocessing import reduction

from sharded_pc import processes, worker
from sharded_pc.errors import ShardError
from sharded_pc.memory import GuestMemory
from sharded_pc.native.guests import Guests

ANSWER_SECONDS = 30.0
"""A worker answers in milliseconds; registering 8192 stripes takes some more."""
STOP_SECONDS = 5.0


class ShardProcess:
    """One worker process and the pipe to it.  `on_trouble(error)` is called when it dies or says
    that it is broken; `on_guest_trouble(slot, text)` when a guest of it is."""

    def __init__(self, memory: GuestMemory, index: int) -> None:
        self.index = index
        self.on_trouble: Callable[[ShardError], None] = lambda error: None
        self.on_guest_trouble: Callable[[int, str], None] = lambda slot, text: None
        self.process, self._conn = processes.start(
            worker.main, memory.name, index, name=f"shard-{index}"
        )
        memory.control.note_worker(index, self.process.pid)
        self._answer: asyncio.Future | None = None
        self._turn = asyncio.Lock()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._conn.fileno(), self._on_message)
        self._ready = self._expect()

    def _expect(self) -> asyncio.Future:
        self._answer = self._loop.create_future()
        return self._answer

    def _on_message(self) -> None:
        try:
            word, *rest = self._conn.recv()
        except (EOFError, ConnectionResetError):
            self._on_death()
            return
        if word == "broken":
            self.on_trouble(ShardError(rest[0]))
        elif word == "guest-broken":
            self.on_guest_trouble(*rest)
        elif self._answer is not None and not self._answer.done():
            if word == "ok":
                self._answer.set_result(None)
            else:
                self._answer.set_exception(ShardError(f"worker of shard {self.index}: {rest[0]}"))

    def _on_death(self) -> None:
        self._loop.remove_reader(self._conn.fileno())
        if self._stopping:
            return
        self.process.join(STOP_SECONDS)
        error = ShardError(
            f"the worker of shard {self.index} (pid {self.process.pid}) died, "
            f"{_death(self.process.exitcode)}"
        )
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self.on_trouble(error)

    async def ready(self) -> None:
        """Returns when the worker is up; ShardError."""
        await self._wait(self._ready)

    async def _wait(self, answer: asyncio.Future) -> None:
        try:
            await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            raise ShardError(
                f"the worker of shard {self.index} did not answer for {ANSWER_SECONDS:.0f} s"
            ) from None

    async def tell(self, word: str, *arguments: object, fd: int | None = None) -> None:
        """Sends one message and waits for its answer; ShardError with the worker's reason."""
        async with self._turn:
            answer = self._expect()
            try:
                self._conn.send((word, *arguments))
                if fd is not None:
                    reduction.send_handle(self._conn, fd, self.process.pid)
            except (BrokenPipeError, ConnectionResetError):
                raise ShardError(f"the worker of shard {self.index} is gone") from None
            await self._wait(answer)

    async def stop(self) -> None:
        """Ends the process: asked, then killed.  Never raises; a second call does nothing."""
        if self._stopping:
            return
        self._stopping = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
            self._conn.send(("stop",))
        await asyncio.to_thread(self.process.join, STOP_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            await asyncio.to_thread(self.process.join)
        self._loop.remove_reader(self._conn.fileno())
        self._conn.close()
        self.process.close()


def _death(exitcode: int | None) -> str:
    if exitcode is None:
        return "its exit code is not known"
    return f"killed by signal {-exitcode}" if exitcode < 0 else f"exit code {exitcode}"


class Shards:
    """All workers of one receiver; `guests` is the stream's thread's table of guests, which changes
    with theirs."""

    def __init__(self, memory: GuestMemory, count: int, guests: Guests) -> None:
        self.guests = guests
        self.processes = [ShardProcess(memory, index) for index in range(count)]

    async def ready(self) -> None:
        await asyncio.gather(*(p.ready() for p in self.processes))

    async def tell(self, word: str, *arguments: object, fd: int | None = None) -> None:
        """Tells all workers, waits for all; the first ShardError.  Each gets a copy of `fd`."""
        await asyncio.gather(*(p.tell(word, *arguments, fd=fd) for p in self.processes))

    async def add_guest(self, slot: int, addresses: list[int], mode: int, uffds: list[int]) -> None:
        """Each worker gets its shard's userfaultfd; the first ShardError."""
        self.guests.add(slot, uffds, addresses)
        told = [
            process.tell("guest", slot, addresses, mode, fd=fd)
            for process, fd in zip(self.processes, uffds, strict=True)
        ]
        await asyncio.gather(*told)

    async def drop_guest(self, slot: int, release: bool) -> None:
        try:
            await self.tell("drop", slot, release)
        finally:
            self.guests.drop(slot)

    async def stop(self) -> None:
        await asyncio.gather(*(p.stop() for p in self.processes))
