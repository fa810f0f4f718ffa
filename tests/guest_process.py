"""A guest for tests, ``GuestProcess``: in a process of its own, obeying one word at a time.

A thread that waits for a page cannot be interrupted, so no test touches missing pages itself.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import random
import threading
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sharded_pc
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.native import oracle
from sharded_pc.testing.oracle import PageOracle
from tests.synthetic import ORACLE, WAIT_S, Background


class GuestProcess:
    """``ask(word, ...)`` runs a method of ``_Guest`` there; ``say`` and ``answer`` are halves."""

    def __init__(self, pages: PageOracle = ORACLE) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._conn, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_guest_main, args=(theirs, pages), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> GuestProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._conn.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, word: str, *arguments: object, **options: object) -> None:
        self._conn.send((word, arguments, options))

    def answer(self, timeout: float = WAIT_S) -> Any:
        """What it answers to the oldest word; GuestFailed with its error."""
        assert self._conn.poll(timeout), f"guest {self.pid} does not answer"
        ok, value = self._conn.recv()
        if not ok:
            raise GuestFailed(*value)
        return value

    def ask(self, word: str, *arguments: object, **options: object) -> Any:
        self.say(word, *arguments, **options)
        return self.answer()

    def silent(self) -> bool:
        """It has not answered yet."""
        return not self._conn.poll(0)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class GuestFailed(AssertionError):
    """``kind`` is the name of what a guest raised."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


def _guest_main(conn, pages: PageOracle) -> None:
    guest = _Guest(pages)
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            word, arguments, options = conn.recv()
            try:
                conn.send((True, getattr(guest, word)(*arguments, **options)))
            except Exception as error:
                conn.send((False, (type(error).__name__, str(error))))


class _Guest:
    """The words a GuestProcess obeys."""

    def __init__(self, pages: PageOracle) -> None:
        self._oracle = pages
        self._guest: sharded_pc.Guest
        self._threads: list[threading.Thread] = []

    def attach(self, target: str, *, wait_ready: bool = True, timeout: float = WAIT_S) -> dict:
        self._guest = sharded_pc.attach(target, timeout=timeout, wait_ready=wait_ready)
        return {"number": self._guest.number, "completed": self._guest.completed}

    def attach_with_few_maps(self, target: str, left: int) -> dict:
        from tests.few_maps import few_maps

        with few_maps(left):
            return self.attach(target)

    def wait_ready(self, timeout: float = WAIT_S) -> bool:
        self._guest.wait_ready(timeout)
        return self._guest.completed

    def wait(self, timeout: float = WAIT_S) -> bool:
        self._guest.wait(timeout)
        return self._guest.completed

    def close(self) -> None:
        self._guest.close()

    def read(self, block: str, offset: int) -> int:
        """A byte, by Python's own hands: it holds the GIL while it waits for the page."""
        return self._guest.blocks[block][offset]

    def close_in_use(self, block: str, offset: int) -> int:
        """The byte, read after a close() that was refused because of a view in use."""
        with self._guest.blocks[block][offset : offset + 1] as view:
            try:
                self._guest.close()
            except BufferError:
                return view[0]
        raise AssertionError("closed under a view")

    def wait_in_thread(self) -> None:
        """Until a thread waits for the end, without a timeout."""
        self._waiting = Background(lambda: self._guest.wait())

    def waited(self) -> None:
        """Raises what that raised."""
        self._waiting.result()

    def say_into(self, path: str) -> None:
        """What it says on stderr from now on."""
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 2)

    def say_into_full_pipe(self) -> None:
        """As say_into(), with a reader that does not read."""
        self._unread, full = os.pipe()
        os.set_blocking(full, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(full, bytes(1 << 16))
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(full, b"x")
        os.set_blocking(full, True)
        os.dup2(full, 2)
        os.close(full)

    def child_closes(self) -> int:
        """A forked child closes its copy of the guest: its exit code."""
        pid = os.fork()
        if pid == 0:
            self._guest.close()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def userfaultfds(self) -> int:
        return sum("userfaultfd" in target for target in open_files(os.getpid()))

    def visit(self, block: int, pages: Sequence[int], versions: bytes | None = None,
              write: bytes | None = None) -> int | None:  # fmt: skip
        """Touches and checks pages; the first wrong one, or None."""
        memory = self._guest.blocks[self._oracle.blocks[block].name]
        expected = versions or self._oracle.final(block)
        right, _ = oracle.visit(
            memory, self._oracle.seed, block, array("Q", pages), expected, write
        )
        return None if right == len(pages) else pages[right]

    def visit_all(self, seed: int = 0, threads: int = 1) -> list:
        """Each thread visits every page of every block, in an order of its own; what was wrong."""
        wrong: list[tuple[int, int]] = []

        def work(number: int) -> None:
            for block, ram in enumerate(self._oracle.blocks):
                order = list(range(ram.pages))
                random.Random(seed * 100 + number).shuffle(order)
                if (page := self.visit(block, order)) is not None:
                    wrong.append((block, page))

        workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return wrong

    def child_reads(self, block: int, page: int) -> int:
        """A forked child reads the page's first byte: its exit code, or minus its signal."""
        memory, pid = self._guest.blocks[self._oracle.blocks[block].name], os.fork()
        if pid == 0:
            os._exit(memory[page * PAGE_BYTES])
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def keep_touching(self, path: str, missing: tuple[int, int], block: int,
                      here: Sequence[int]) -> int:  # fmt: skip
        """One thread touches a missing page, another goes round those that are here, counting in
        ``Counters``; the first one's thread id."""
        counters = Counters(path)
        stuck = threading.Thread(target=self._touch_one, args=(counters, *missing), daemon=True)
        going = threading.Thread(target=self._go_round, args=(counters, block, here), daemon=True)
        stuck.start()
        going.start()
        return stuck.native_id

    def _touch_one(self, counters: Counters, block: int, page: int) -> None:
        wrong = self.visit(block, [page])
        counters.note("wrong" if wrong is not None else "arrived")

    def _go_round(self, counters: Counters, block: int, here: Sequence[int]) -> None:
        while True:
            for page in here:
                counters.note("visits" if self.visit(block, [page]) is None else "wrong")


class Counters:
    """Numbers that a guest counts up and a test reads, in a file that both have mapped."""

    WORDS = ("visits", "arrived", "wrong")

    def __init__(self, path: str | Path) -> None:
        with open(path, "a+b") as file:
            file.truncate(8 * len(self.WORDS))
            self._map = memoryview(mmap.mmap(file.fileno(), 8 * len(self.WORDS))).cast("Q")

    def note(self, word: str) -> None:
        self._map[self.WORDS.index(word)] += 1

    def __getitem__(self, word: str) -> int:
        return self._map[self.WORDS.index(word)]


def open_files(pid: int) -> Iterator[str]:
    """What the descriptors of a process are."""
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/{pid}/fd/{entry}")


def waits_for_page(pid: int, thread: int) -> bool:
    """The thread sleeps in the kernel, as far as one can see for a page."""
    task = Path(f"/proc/{pid}/task/{thread}")
    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    where = (task / "wchan").read_text()
    return state in "SD" and where in ("handle_userfault", "0", "")
