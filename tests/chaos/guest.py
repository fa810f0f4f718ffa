"""A guest that goes on for many migrations: checks and rewrites all of its memory until each ends.

Every page is always what the source had there last, or what the guest wrote there last. Guests
share a RAM by pages, so that each knows all that is written to its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import threading
import time
from array import array
from pathlib import Path

import sharded_pc
from sharded_pc import processes
from sharded_pc.errors import AttachError, ShardedPcError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.native import oracle
from sharded_pc.testing.oracle import GUEST, PRECOPIED, PageOracle

THREADS = 2
BATCH_PAGES = 32
STEP_S = 20.0
END_S = 5.0
AGAIN_S = 0.01
LOG = Path("build/chaos/guests.log")
MARKS = range(GUEST, 200)


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One migration for one of `guests`."""

    attach: str
    pages: PageOracle
    guest: int
    guests: int
    pace_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """`wrong` tells of the first wrong page; `failed` what the receiver said when it failed."""

    visits: int = 0
    written: int = 0
    wrong: str | None = None
    failed: str | None = None


class Guest:
    """Its process.  After a failure a thread may wait for a page for ever: then it is renewed."""

    def __init__(self) -> None:
        self._process, self._conn = processes.start(_main, name="chaos-guest", daemon=True)

    def go(self, task: Task) -> None:
        self._conn.send(task)

    def report(self, timeout: float) -> Report | None:
        """None: it has nothing to say."""
        try:
            return self._conn.recv() if self._conn.poll(timeout) else None
        except EOFError:
            return Report(wrong=f"the guest died: exit code {self._process.exitcode}")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._conn.close()


def _main(conn) -> None:
    _write_to(LOG)
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            conn.send(_migrate(conn.recv()))


def _write_to(log: Path) -> None:
    """What a guest's client says on standard error is no line of a migration."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)


def _migrate(task: Task) -> Report:
    """After a failure threads may still wait in memory that must stay mapped then."""
    try:
        guest = _attach(task.attach)
        visitors = [_Visitor(guest, task, thread) for thread in range(THREADS)]
        guest.wait(STEP_S * 2)
        report = _sum([visitor.end() for visitor in visitors])
        guest.close()
        return report
    except (ShardedPcError, OSError, BufferError) as error:
        return Report(failed=f"{type(error).__name__}: {error}")


def _attach(path: str) -> sharded_pc.Guest:
    """Who has touched nothing yet may be told that the receiver is gone: it comes again, as there
    may be a successor."""
    deadline = time.monotonic() + STEP_S
    while True:
        try:
            return _attach_once(path)
        except (AttachError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_S)


def _attach_once(path: str) -> sharded_pc.Guest:
    with contextlib.ExitStack() as undo:
        guest = sharded_pc.attach(path, timeout=STEP_S, wait_ready=False)
        undo.callback(guest.close)
        guest.wait_ready(STEP_S)
        undo.pop_all()
        return guest


def _sum(reports: list[Report]) -> Report:
    return Report(
        sum(report.visits for report in reports),
        sum(report.written for report in reports),
        next((report.wrong for report in reports if report.wrong), None),
    )


class _Visitor:
    """A thread over its share of the pages."""

    def __init__(self, guest: sharded_pc.Guest, task: Task, thread: int) -> None:
        self._task, self._blocks, self._addresses = task, guest.blocks, guest.addresses()
        self._draw = random.Random(f"{task.pages.seed}/{task.guest}/{thread}")
        every = task.guests * THREADS
        count = range(len(task.pages.blocks))
        self._expected = [bytearray(task.pages.final(block)) for block in count]
        first = task.guest * THREADS + thread
        self._mine = [range(first, block.pages, every) for block in task.pages.blocks]
        self._wholes = [block for block in count if self._mine[block]]
        self._visits = self._written = 0
        self._wrong: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go_round, daemon=True)
        self._thread.start()

    def end(self) -> Report:
        """Once over everything, now that all of it is here."""
        self._stop.set()
        self._thread.join(END_S)
        if self._thread.is_alive():
            return Report(wrong=f"a thread waits for a page that is here: {self._describe_wait()}")
        for block in self._wholes:
            self._visit(block, list(self._mine[block]), 0)
        return Report(self._visits, self._written, self._wrong)

    def _describe_wait(self) -> str:
        """The thread's wait, and what of its batch is not mapped here."""
        block, pages = self._at
        name = self._task.pages.blocks[block].name
        first = self._addresses[name] // PAGE_BYTES
        missing = [page for page in pages if not _is_mapped(first + page)]
        where = Path(f"/proc/self/task/{self._thread.native_id}/wchan").read_text()
        return f"{where}, of block {block} not mapped: {missing} of {pages}"

    def _go_round(self) -> None:
        while self._wrong is None and not self._stop.wait(self._task.pace_s):
            block = self._draw.choice(self._wholes)
            mine = self._mine[block]
            pages = self._draw.sample(mine, min(self._draw.randint(1, BATCH_PAGES), len(mine)))
            self._visit(block, pages, self._draw.choice((0, 0, 1, 4)))

    def _visit(self, block: int, pages: list[int], writes: int) -> None:
        if self._wrong is not None:
            return
        self._at = block, pages
        memory = self._blocks[self._task.pages.blocks[block].name]
        expected, write = self._expected[block], None
        if writes:
            write = bytearray([oracle.KEEP]) * len(expected)
            for page in pages[:writes]:
                write[page] = self._draw.choice(MARKS)
        seed, order = self._task.pages.seed, array("Q", pages)
        right, _ = oracle.visit(memory, seed, block, order, expected, write)
        if right < len(pages):
            self._wrong = self._describe(block, pages[right], memory)
            return
        self._visits += len(pages)
        for page in pages[:writes]:
            expected[page] = write[page]
            self._written += 1

    def _describe(self, block: int, page: int, memory: memoryview) -> str:
        """What it should be, and what it looks like, now and when it is read again."""
        expected = self._expected[block][page]
        data = bytes(memory[page * 4096 : page * 4096 + 4096])
        seed = self._task.pages.seed
        known = [v for v in range(GUEST + 100) if oracle.check(data, seed, block, page, v) < 0]
        at = oracle.check(data, seed, block, page, expected)
        return (
            f"page {page} of block {block}: expected version {expected} "
            f"(precopied {self._task.pages.precopied(block)[page]}, "
            f"final {self._task.pages.final(block)[page]}), read again it is version {known}, "
            f"wrong from byte {at}, {data.count(0)} zero bytes"
        )


def _is_mapped(number: int) -> bool:
    """Documentation/admin-guide/mm/pagemap.rst: bit 63, present."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(number * 8)
        return bool(file.read(8)[7] & 0x80)


assert PRECOPIED < GUEST <= MARKS.start < MARKS.stop < oracle.KEEP
