"""Receivers, sources and guests for tests that need no QEMU.

``Receiving``     a Coordinator on a thread of this process, with real workers
``LoneReceiver``  no process at all: stream, shards and memory in the caller, for many short runs
``StepSource``    a SyntheticSource that sends what a test tells it to
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import random
import socket
import threading
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sharded_pc import host
from sharded_pc.address import FdAddress
from sharded_pc.coordinator import Coordinator, Settings
from sharded_pc.errors import ShardedPcError
from sharded_pc.geometry import PAGE_BYTES, Geometry, Placement, RamBlock
from sharded_pc.incoming import Incoming
from sharded_pc.memory import GuestMemory
from sharded_pc.native.alias import Alias
from sharded_pc.native.guests import Guests
from sharded_pc.native.ram import Stop
from sharded_pc.populate import Populator
from sharded_pc.source import SyntheticSource
from sharded_pc.state import MigrationStatus
from sharded_pc.testing.oracle import DIRTIED, PageOracle
from sharded_pc.way_back import WayBack
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
        settings.setdefault("incoming", FdAddress(self._theirs.fileno()))
        self._settings = Settings(name=name, workers=workers, **settings)
        self.coordinator: Coordinator
        self._listening = threading.Event()

    def __enter__(self) -> Receiving:
        if isinstance(self._settings.incoming, FdAddress):
            self._theirs.detach()  # the receiver's
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
        self._theirs.close()
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
        self.back: WayBack
        self._stop = Stop()
        self.broken: list[str] = []
        self.statuses: list[MigrationStatus] = []
        self.devices = b""

    def run(self, stream: bytes, timeout: float = 10.0) -> ShardedPcError | None:
        self.source, ours = socket.socketpair()
        self.back = WayBack(self.memory, ours.fileno())
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
            asyncio.run(self.back.end())
            ours.close()
            writing.join()
            self.source.close()
            self.devices = incoming.devices

    def _write(self, stream: bytes) -> None:
        with contextlib.suppress(OSError):
            self.source.sendall(stream)
            self.source.shutdown(socket.SHUT_WR)

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

    def ram_begins(self) -> None:
        pass

    def serve_requested(self, main: object) -> None:
        pass

    def requested_served(self) -> None:
        pass

    def stop_requested(self) -> None:
        pass

    def sync_channels(self, *, flush: bool) -> None:
        pass

    def settle_channels(self) -> None:
        pass

    def look_at_channels(self) -> None:
        pass

    def prepare_discard(self) -> None:
        for worker in self._workers:
            worker.prepare()

    def listen(self) -> None:
        for worker in self._workers:
            worker.listen()

    acks_switchover = False

    def configured(self, machine: str) -> None: ...

    def load_devices(self, data: bytes) -> None: ...

    def placed(self) -> None: ...

    def status_changed(self, status: MigrationStatus) -> None:
        self.statuses.append(status)
