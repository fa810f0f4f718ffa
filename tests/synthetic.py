"""Receivers, sources and guests for tests that need no QEMU.

``Receiving``     a Coordinator on a thread of this process, with real workers
``LoneReceiver``  no process at all: stream, shards and memory in the caller, for many short runs
``StepSource``    a SyntheticSource that sends what a test tells it to
``GuestProcess``  a guest in a process of its own, obeying one word at a time: a thread that waits
                  for a page cannot be interrupted, so no test touches missing pages itself
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import mmap
import multiprocessing
import os
import random
import socket
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sharded_pc
from sharded_pc import host
from sharded_pc.address import FdAddress
from sharded_pc.coordinator import Coordinator, Settings
from sharded_pc.errors import ShardedPcError
from sharded_pc.geometry import PAGE_BYTES, Geometry, Placement, RamBlock
from sharded_pc.incoming import Incoming
from sharded_pc.memory import GuestMemory
from sharded_pc.native import oracle
from sharded_pc.native.alias import Alias
from sharded_pc.native.guests import Guests
from sharded_pc.native.ram import Stop
from sharded_pc.native.return_path import ReturnPath
from sharded_pc.populate import Populator
from sharded_pc.source import SyntheticSource
from sharded_pc.state import MigrationStatus
from sharded_pc.testing.oracle import DIRTIED, PageOracle
from sharded_pc.wire import writer
from sharded_pc.worker import ShardWorker
from tests.qemu import wait_until

WAIT_S = 20.0
STRIPE_BYTES = 256 << 10
BLOCKS = (RamBlock("pc.ram", 4 << 20), RamBlock("vga.vram", 1 << 20))


@dataclasses.dataclass(frozen=True)
class ChangingOracle(PageOracle):
    """Some pages turn to zeros after they were precopied, so that postcopy has zero pages too."""

    turned_share: float = 0.15

    @functools.cache  # noqa: B019
    def final(self, block: int) -> bytes:
        chance = random.Random(f"{self.seed}/{block}/final")
        return bytes(self._last(chance.random(), old) for old in self.precopied(block))

    def _last(self, at: float, old: int) -> int:
        if at < self.turned_share:
            return 0
        return DIRTIED if at < self.turned_share + self.dirty_share else old


ORACLE = ChangingOracle(BLOCKS, seed=11, dirty_share=0.65)


def missing_pages(pages: PageOracle, block: int, version: int | None = None) -> list[int]:
    """Those that postcopy must bring, or those of them that end as ``version``."""
    pairs = enumerate(zip(pages.precopied(block), pages.final(block), strict=True))
    return [n for n, (old, new) in pairs if old != new and version in (None, new)]


class Background:
    """A function on a thread; ``result()`` gives what it returned or raises what it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._result, self.error = work, None, None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self.error = error

    def result(self, timeout: float = WAIT_S) -> Any:
        self.thread.join(timeout)
        assert not self.thread.is_alive(), f"{self._work} did not end in {timeout} s"
        if self.error is not None:
            raise self.error
        return self._result


# --- sources ---


class StepSource(SyntheticSource):
    """Goes as far as it is told; ``oracle`` says what it has."""

    def __init__(self, sock: socket.socket, pages: PageOracle = ORACLE, **options: Any) -> None:
        super().__init__(sock, pages, **options)
        self.oracle = pages

    def begin(self) -> None:
        """Through the switch: the destination runs, nothing of postcopy has been sent."""
        self.set_up()
        self.precopy()
        self.switch()

    def wait_switched(self) -> None:
        """The destination has answered the last PING: it is RUNNING and takes pages."""
        wait_until(lambda: 4 in self.back.pongs or self.back.error, "the last PONG", WAIT_S)
        assert self.back.error is None, self.back.error

    def send_pages(self, block: int, pages: Sequence[int], versions: bytes | None = None) -> None:
        """Sends pages as they are at the end, or in other versions."""
        for page in pages:
            self._missing[block][page] = 0
        self.again(block, pages, versions)

    def again(self, block: int, pages: Sequence[int], versions: bytes | None = None) -> None:
        """Sends pages that were sent before."""
        records = self._records(block, array("Q", pages), versions or self._final[block])
        self._send(writer.ram_section(records))

    def request(self, timeout: float = WAIT_S) -> tuple[int, int]:
        """The oldest page that was asked for, as (block, page), left unanswered."""
        assert self.back.wait_request(timeout) and self.back.requests, "no request came"
        wanted = self.back.requests.popleft()
        names = [block.name for block in self.oracle.blocks]
        return names.index(wanted.block), wanted.start // PAGE_BYTES

    def end(self) -> None:
        self.postcopy()
        self.finish()


def connect(uri: str) -> socket.socket:
    """A source's socket to a receiver's ``unix:`` address."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(uri.removeprefix("unix:"))
    sock.settimeout(WAIT_S)
    return sock


@contextlib.contextmanager
def open_source(sock: socket.socket, pages: PageOracle = ORACLE, **options: Any):
    """A StepSource whose socket and reader end with the block."""
    source = StepSource(sock, pages, **options)
    try:
        yield source
    finally:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        source.back._thread.join(WAIT_S)
        sock.close()


# --- receivers ---

PLACEMENT: Placement | None = None
"""Of receivers that are told nothing else; the fixture `placement` sets it."""


class Receiving:
    """A receiver on a thread; ``sock`` is its source's end. ``finish()`` gives its info or raises
    its error; at the end of the block it is told to quit if it still runs."""

    def __init__(self, folder: Path, name: str, *, workers: int = 2, **settings: Any) -> None:
        self.sock, self._theirs = socket.socketpair()
        self.sock.settimeout(WAIT_S)
        self.attach = str(folder / f"{name}.attach")
        self.name = name
        given = {"attach": self.attach, "stripe_bytes": STRIPE_BYTES, "placement": PLACEMENT}
        settings = {**given, **settings}
        self._settings = Settings(
            incoming=FdAddress(self._theirs.fileno()), name=name, workers=workers, **settings
        )
        self.coordinator: Coordinator
        self._listening = threading.Event()

    def __enter__(self) -> Receiving:
        self._theirs.detach()
        self._thread = Background(lambda: asyncio.run(self._main()))
        if not self._listening.wait(WAIT_S):
            self._thread.result(0)
        return self

    async def _main(self) -> dict:
        self._loop = asyncio.get_running_loop()
        async with Coordinator(self._settings, lambda _: self._listening.set()) as coordinator:
            self.coordinator = coordinator
            info = await coordinator.receive()
            await coordinator.last_word()
            return info

    def finish(self) -> dict:
        return self._thread.result()

    def quit(self) -> None:
        self._loop.call_soon_threadsafe(self.coordinator.quit)

    def worker_pids(self) -> list[int]:
        return self.coordinator.shards.pids()

    def received(self) -> int:
        return sum(self.coordinator.memory.received_pages())

    def wait_received(self, pages: int) -> None:
        wait_until(lambda: self.received() >= pages, f"{pages} received pages", WAIT_S)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and not self._thread.thread.is_alive():
            error.add_note(f"the receiver ended before: {self._thread.error!r}")
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        if self._thread.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ended just now
                self.quit()
        self._thread.thread.join(WAIT_S)
        self.sock.close()
        assert not self._thread.thread.is_alive(), "the receiver does not end"


class LoneReceiver:
    """A stream, its shards and their memory in this process: both sides of ``Incoming``.

    ``run(stream)`` returns the error that ended the stream, None if it was received whole.
    """

    def __init__(self, name: str, shards: int = 2, placement: Placement = Placement.COPY) -> None:
        self.memory = GuestMemory.create(name, shards)
        self.guests = Guests(self.memory.control)
        self._placement = placement
        self._populator = Populator(self.memory)
        self.aliases: Sequence[Alias] = ()
        self._workers: list[ShardWorker] = []
        self._return_path: ReturnPath | None = None
        self._back: threading.Thread | None = None
        self._stop = Stop()
        self.broken: list[str] = []
        self.statuses: list[MigrationStatus] = []
        self.devices = b""

    def run(self, stream: bytes, timeout: float = 10.0) -> ShardedPcError | None:
        self.source, ours = socket.socketpair()
        self._ours = ours
        writing = threading.Thread(target=self._write, args=(stream,))
        watchdog = threading.Timer(timeout, self._stop.set)
        incoming = Incoming(self.memory, ours.fileno(), self._stop, self, self)
        writing.start()
        watchdog.start()
        try:
            incoming.run()
        except ShardedPcError as error:
            assert not self._stop.is_set, f"the stream hangs ({error})"
            return error
        finally:
            watchdog.cancel()
            self._end_return_path()
            ours.close()
            writing.join()
            self.source.close()
            self.devices = incoming.devices

    def _write(self, stream: bytes) -> None:
        with contextlib.suppress(OSError):
            self.source.sendall(stream)
            self.source.shutdown(socket.SHUT_WR)

    def _end_return_path(self) -> None:
        if self._return_path is not None:
            self._return_path.stop()
            self._back.join()

    def _send_back(self) -> None:
        with contextlib.suppress(ShardedPcError):  # the source has shut the wire
            self._return_path.loop()

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()
            worker.close()
            worker.memory.close()
        self.guests.close()
        self._populator.close()
        self.memory.unlink()
        self.memory.close()
        self._stop.close()

    def define(self, blocks: tuple[RamBlock, ...]) -> None:
        shards = self.memory.control.view.n_shards
        geometry = Geometry.of(blocks, shards, STRIPE_BYTES)
        host.require_memory(geometry.total)
        self.memory.define(geometry, self._placement)
        if self._placement is Placement.CONTINUE:
            self._populator.start()
        for index in range(shards):
            worker = ShardWorker(GuestMemory.open(self.memory.name), index)
            self._workers.append(worker)
            worker.on_broken = functools.partial(self._note_broken, index)
            worker.geometry()
            worker.start_placing()
        self.aliases = self._populator.aliases

    def _note_broken(self, index: int, text: str) -> None:
        self.broken.append(text)
        self.memory.control.note_failed(index, failed=True)

    def one_channel(self) -> None:
        pass

    def open_return_path(self) -> None:
        if self._return_path is None:
            self._return_path = ReturnPath(self.memory.control, self._ours.fileno())
            self._back = threading.Thread(target=self._send_back)
            self._back.start()

    def post(self, message: bytes) -> None:
        self._return_path.post(message)

    def send_bitmap(self, block: int) -> None:
        self._return_path.bitmap(self.memory.received, block)

    def prepare_discard(self) -> None:
        for worker in self._workers:
            worker.prepare()

    def listen(self) -> None:
        for worker in self._workers:
            worker.listen()

    def configured(self, machine: str) -> None: ...

    def load_devices(self, data: bytes) -> None: ...

    def placed(self) -> None: ...

    def status_changed(self, status: MigrationStatus) -> None:
        self.statuses.append(status)


# --- guests ---


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
