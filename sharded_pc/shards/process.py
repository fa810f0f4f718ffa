"""One worker process, from its start to its end, and the pipe to it.

A worker is started without a shard: it imports everything, opens the memory by name, and waits to
be told which one it is.  Its death is a pidfd that becomes readable; what it is told, and has not
answered by then, ends as WorkerDied.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
from collections.abc import Callable
from multiprocessing import reduction

from sharded_pc import processes, worker
from sharded_pc.errors import ShardError
from sharded_pc.host import oom
from sharded_pc.shards.step import Step

ANSWER_SECONDS = 30.0
"""A worker answers in milliseconds; registering 8192 stripes takes some more."""
STOP_SECONDS = 5.0


class WorkerDied(ShardError):
    """The process has ended and was reaped; a successor may take its shard.  `for_memory`: it would
    be taken by the OOM killer as well."""

    def __init__(self, text: str, *, for_memory: bool = False) -> None:
        super().__init__(text)
        self.for_memory = for_memory


class ShardProcess:
    """`on_end(process)` is called once it has ended without being told to, before whoever waits for
    an answer hears of it; `on_guest_trouble(slot, text)` when it cannot serve a guest."""

    def __init__(self, memory_name: str) -> None:
        self.index: int | None = None
        self.placing = 0
        """the thread of its placement loop, 0: none runs yet"""
        self.done: set[Step] = set()
        self.error: WorkerDied | None = None
        self.on_end: Callable[[ShardProcess], None] = lambda process: None
        self.on_guest_trouble: Callable[[int, str], None] = lambda slot, text: None
        self._loop = asyncio.get_running_loop()
        self._process, self._conn = processes.start(worker.main, memory_name, name="worker")
        self.pid = self._process.pid
        self._pidfd = self._watched()
        self._turn = asyncio.Lock()
        self._ended = asyncio.Event()
        self._stopping = False
        self._reason = ""
        self._loop.add_reader(self._conn.fileno(), self._on_message)
        self._loop.add_reader(self._pidfd, self._on_end)
        self._answers: collections.deque[asyncio.Future] = collections.deque()
        """to what it was told, the oldest first; who waited for one may have gone away"""
        self._ready = self._expect()
        self.oom = oom.Recent()

    def _watched(self) -> int:
        try:
            return os.pidfd_open(self.pid)
        except OSError:  # EMFILE
            self._process.kill()
            self._process.join()
            self._conn.close()
            raise

    def _expect(self) -> asyncio.Future:
        answer = self._loop.create_future()
        answer.add_done_callback(_look_at)
        self._answers.append(answer)
        return answer

    def _on_message(self) -> None:
        if not self._take_message():
            self._loop.remove_reader(self._conn.fileno())
            self._process.kill()

    def _take_message(self) -> bool:
        """False: the pipe has ended."""
        try:
            word, *rest = self._conn.recv()
        except (EOFError, OSError):  # OSError: killed in the middle of a message
            return False
        if word == "broken":
            self.kill(rest[0])
        elif word == "placing":
            self.placing = rest[0]
        elif word == "guest-broken":
            self.on_guest_trouble(*rest)
        else:
            self._take_answer(word, *rest)
        return True

    def _take_answer(self, word: str, text: str = "") -> None:
        answer = self._answers.popleft()
        if not answer.done():
            if word == "ok":
                answer.set_result(None)
            else:
                answer.set_exception(ShardError(f"worker of shard {self.index}: {text}"))

    def _on_end(self) -> None:
        while self._conn.poll() and self._take_message():
            pass
        self._loop.remove_reader(self._conn.fileno())
        self._loop.remove_reader(self._pidfd)
        self._process.join()
        exitcode = self._process.exitcode
        self.error = WorkerDied(self._obituary(exitcode), for_memory=self._by_oom(exitcode))
        os.close(self._pidfd)
        self._conn.close()
        self._process.close()
        self._ended.set()
        if not self._stopping:
            self.on_end(self)
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(self.error)

    def _obituary(self, exitcode: int | None) -> str:
        whose = "a spare worker" if self.index is None else f"the worker of shard {self.index}"
        who = f"{whose} (pid {self.pid})"
        if self._reason:
            return f"{who} was ended: {self._reason}"
        if exitcode is None:
            return f"{who} died, its exit code is not known"
        how = f"killed by signal {-exitcode}" if exitcode < 0 else f"exit code {exitcode}"
        if self._by_oom(exitcode):
            how += f" ({oom.remedy()})"
        return f"{who} died, {how}"

    def _by_oom(self, exitcode: int | None) -> bool:
        return not self._reason and exitcode == -signal.SIGKILL and self.oom.any()

    def kill(self, reason: str) -> None:
        """It is of no use any more; the first reason counts."""
        self._reason = self._reason or reason
        if self.error is None:
            self._process.kill()

    def is_stopped(self) -> bool:
        """By a signal (SIGSTOP); a debugger's hold is not seen."""
        what = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):
            return self.error is None and os.waitid(os.P_PID, self.pid, what) is not None
        return False

    def sleeps(self) -> bool:
        """Its placement loop neither runs, nor wants to, nor is at work in the kernel."""
        return processes.thread_state(self.pid, self.placing) not in ("R", "D")

    @property
    def is_ready(self) -> bool:
        """It may be told something at once."""
        answer = self._ready
        return self.error is None and answer.done() and answer.exception() is None

    async def ready(self) -> None:
        """Returns when it may be told something; ShardError."""
        await self._wait(self._ready)

    async def _wait(self, answer: asyncio.Future) -> None:
        """WorkerDied, also if it has to be killed because it does not answer."""
        done, _ = await asyncio.wait({answer}, timeout=ANSWER_SECONDS)
        if not done:
            self.kill(f"it did not answer for {ANSWER_SECONDS:.0f} s")
        await asyncio.shield(answer)

    async def tell(self, word: str, *arguments: object, fd: int = -1) -> None:
        """Sends one message and waits for its answer; ShardError with the worker's reason,
        WorkerDied."""
        async with self._turn:
            if self.error is None:
                answer = self._expect()
                self._send(word, arguments, fd)
                await self._wait(answer)
                return
        raise self.error

    def _send(self, word: str, arguments: tuple, fd: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end is at hand
            self._conn.send((word, *arguments))
            if fd >= 0:
                reduction.send_handle(self._conn, fd, self.pid)

    async def do(self, step: Step) -> None:
        await self.tell(step.word, *step.arguments, fd=step.fd)
        self.done.add(step)

    async def stop(self) -> None:
        """Ends it: asked, then killed.  Never raises; a second call does nothing."""
        if self._stopping or self.error is not None:
            return
        self._stopping = True
        if self.is_stopped() or not self.is_ready:  # the latter has begun nothing that has to end
            self._process.kill()
        self._send("stop", (), -1)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), STOP_SECONDS)
            return
        self._process.kill()
        await self._ended.wait()


def _look_at(answer: asyncio.Future) -> None:
    """Nobody may wait for it (any more)."""
    if not answer.cancelled():
        answer.exception()
