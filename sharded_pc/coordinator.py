"""The coordinator: owns the postcopy state, the memory and the workers of one receiver.

One asyncio loop for everything that is not bytes of RAM: workers, guests, control clients, signals.
Two threads beside it: the stream (incoming.py; RAM records in C without the GIL) and the return
path (in C).  The stream's thread asks the loop for things through `_Bridge`, and waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from sharded_pc import host
from sharded_pc.address import Address
from sharded_pc.attach.server import STEP_SECONDS, AttachServer
from sharded_pc.awaited import AwaitedPages
from sharded_pc.errors import (
    Cancelled,
    HostError,
    RemoteProtocolError,
    ShardedPcError,
    ShardError,
    UsageError,
)
from sharded_pc.geometry import PAGE_BYTES, Geometry, Placement, RamBlock
from sharded_pc.huge_pages import HugePages
from sharded_pc.incoming import Incoming
from sharded_pc.memory import GuestMemory
from sharded_pc.native.alias import Alias
from sharded_pc.native.guests import Guests
from sharded_pc.native.ram import Stop
from sharded_pc.native.return_path import ReturnPath
from sharded_pc.observe.qmp import QmpServer
from sharded_pc.observe.status import is_over, migration_info
from sharded_pc.populate import Populator
from sharded_pc.shards import Shards
from sharded_pc.state import MigrationStatus
from sharded_pc.transport.candidates import second_channel
from sharded_pc.transport.incoming import Listener, Wire, listen
from sharded_pc.wire import return_path

if TYPE_CHECKING:
    from sharded_pc.destination import QemuDestination

log = logging.getLogger(__name__)

LAST_WORD_SECONDS = 2.0
"""How long control clients that are connected when the migration ends may ask how it ended."""


LOAD_ENDS_SECONDS = 2.0
"""From a destination's exit to the end of loading its devices."""


def runtime_path(name: str, what: str) -> str:
    """Where a receiver's socket stands unless the user says otherwise."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    return str(Path(folder) / f"sharded-pc-{name}.{what}")


def folder_prefix(name: str) -> str:
    """How a receiver's temporary folder is called, so that `clean` can tell whose it was."""
    return f"sharded-pc.{name}."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `receive` is told; paths are file-system paths, None: not wanted."""

    incoming: Address
    name: str
    workers: int = 2
    placement: Placement | None = None
    """None: what this host does best"""
    attach: str | None = None
    control: str | None = None
    record: str | None = None
    keep: bool = False
    reserve: bool = False
    """all RAM is allocated when the block list is here"""
    status_fd: int | None = None
    stripe_bytes: int | None = None
    """None: geometry.default_stripe_bytes"""
    attach_step_seconds: float = STEP_SECONDS
    """patience with a client in the middle of the hand-over"""
    qemu: tuple[str, ...] = ()
    """command line of a destination to resume; (): none"""
    qemu_stdout: int | None = None
    """descriptor that its standard output goes to; None: ours"""


def _is_socket(fd: int) -> bool:
    return fd >= 0 and stat.S_ISSOCK(os.fstat(fd).st_mode)


class _Bridge:
    """incoming.Receiver for the stream's thread: each call runs in the loop and is waited for."""

    def __init__(self, coordinator: Coordinator, loop: asyncio.AbstractEventLoop) -> None:
        self._coordinator = coordinator
        self._loop = loop
        self._is_one_channel = False

    def _call(self, coroutine: Coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    @property
    def guests(self) -> Guests:
        return self._coordinator.guests

    def define(self, blocks: tuple[RamBlock, ...]) -> Sequence[Alias]:
        return self._call(self._coordinator.define(blocks))

    def one_channel(self) -> None:
        """Waited for, once: a source that must not get to its switch has no head start."""
        if not self._is_one_channel:
            self._is_one_channel = True
            self._call(self._coordinator.stop_listening())

    def open_return_path(self) -> None:
        self._coordinator.open_return_path()

    def post(self, message: bytes) -> None:
        self._coordinator.post(message)

    def prepare_discard(self) -> None:
        self._call(self._coordinator.prepare_discard())

    def listen(self) -> None:
        self._call(self._coordinator.listen())

    def configured(self, machine: str) -> None:
        self._coordinator.machine = machine

    def load_devices(self, data: bytes) -> Future | None:
        if self._coordinator.destination is None:
            return None
        return asyncio.run_coroutine_threadsafe(self._coordinator.load_devices(data), self._loop)

    def placed(self) -> None:
        self._call(self._coordinator.release_guests())

    def status_changed(self, status: MigrationStatus) -> None:
        self._loop.call_soon_threadsafe(self._coordinator.status_changed, status)


class Coordinator:
    """One receiver, used once: `async with Coordinator(settings) as c: info = await c.receive()`.

    `on_listening(address)` is called when a source may connect.
    """

    def __init__(
        self, settings: Settings, on_listening: Callable[[Address], None] = lambda address: None
    ) -> None:
        self.settings = settings
        self._on_listening = on_listening
        self._exit = contextlib.AsyncExitStack()
        self._stop = Stop()
        self._trouble: ShardedPcError | None = None
        self._cancelled = asyncio.Event()
        self._return_path: ReturnPath | None = None
        self._return_thread: threading.Thread | None = None
        self._wire: Wire | None = None
        self.memory: GuestMemory
        self._shards: Shards
        self.guests: Guests
        self._populator: Populator
        self._huge_pages: HugePages
        self._attach: AttachServer | None = None
        self._qmp: QmpServer | None = None
        self._listener: Listener
        self.machine = ""
        self.destination: QemuDestination | None = None
        self._watching: asyncio.Task | None = None
        self._loading: asyncio.Task | None = None
        self._second: asyncio.Task | None = None
        self._readying: asyncio.Task | None = None
        self.error: ShardedPcError | None = None

    async def __aenter__(self) -> Coordinator:
        """Everything that can fail before a source connects: host, sockets, memory, workers."""
        try:
            await self._set_up()
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._exit.aclose()

    async def _set_up(self) -> None:
        settings, callback = self.settings, self._exit.callback
        host.require_host(kernel_faults=bool(settings.qemu))
        callback(self._stop.close)
        self.memory = GuestMemory.create(settings.name, settings.workers)
        callback(self._leave_memory)
        self.guests = Guests(self.memory.control)
        callback(self.guests.close)
        self._populator = Populator(self.memory)
        self._huge_pages = HugePages(self.memory, self._populator)
        callback(self._populator.close)
        self.memory.control.status = MigrationStatus.SETUP
        self._record_fd = self._open_recording()
        if settings.qemu:
            self._prepare_destination()
        self._listener = listen(settings.incoming)
        callback(self._listener.close)
        self._shards = Shards(self.memory, settings.workers)
        self._exit.push_async_callback(self._shards.stop)
        for process in self._shards.processes:
            process.on_trouble = self._on_trouble
        await self._shards.ready()
        await self._open_sockets()

    def _prepare_destination(self) -> None:
        from sharded_pc.destination import QemuDestination  # needs a QMP client, `receive` does not

        assert self.settings.attach is not None
        folder = Path(tempfile.mkdtemp(prefix=folder_prefix(self.settings.name)))
        self._exit.callback(shutil.rmtree, folder, ignore_errors=True)
        self.destination = QemuDestination(
            self.settings.qemu,
            self.memory,
            folder,
            self.settings.attach,
            self.request_pages,
            lambda pid: self._attach.guest_of(pid) if self._attach is not None else None,
            self.settings.qemu_stdout,
        )
        self._exit.push_async_callback(self.destination.end)
        self._exit.push_async_callback(self._stop_watching)
        self.destination.check()

    async def _open_sockets(self) -> None:
        settings = self.settings
        try:
            if settings.attach is not None:
                server = AttachServer(
                    settings.attach,
                    self.memory,
                    self._add_guest,
                    self._drop_guest,
                    settings.attach_step_seconds,
                )
                self._attach = server
                self._exit.push_async_callback(server.close)
                for process in self._shards.processes:
                    process.on_guest_trouble = server.broken
            if settings.control is not None:
                self._qmp = QmpServer(settings.control, self.info, self.quit)
                self._exit.push_async_callback(self._qmp.close)
                await self._qmp.start()
        except OSError as error:
            raise HostError(f"make a socket: {error.strerror or error}") from error

    def _leave_memory(self) -> None:
        completed = self.memory.control.status is MigrationStatus.COMPLETED
        if self.settings.keep and completed:
            self.memory.unlink_all_but_ram()
        else:
            self.memory.unlink()
        self.memory.close()

    # The migration

    async def receive(self) -> dict:
        """Waits for a source, receives it whole, and answers migration_info.
        Raises what failed; `info()` tells then as well."""
        try:
            await self._migrate()
        except ShardedPcError as error:
            await self._fail(error)
            raise
        return self.info()

    async def _migrate(self) -> None:
        self._announce()
        self._wire = await self._or_cancelled(self._listener.accept())
        self._exit.callback(self._wire.close)
        self._second = asyncio.create_task(self._refuse_second_connection())
        self._exit.callback(self._second.cancel)
        self.memory.control.note_started()
        bridge = _Bridge(self, asyncio.get_running_loop())
        incoming = Incoming(self.memory, self._wire.fd, self._stop, bridge, self._record_fd)
        try:
            await asyncio.to_thread(incoming.run)
        except ShardedPcError:
            if self._trouble is not None:
                raise self._trouble from None
            raise
        finally:
            await self._end_return_path()
        await self.release_guests()
        await self._huge_pages.settle(self._guest_pids())

    async def _refuse_second_connection(self) -> None:
        """Multifd (and 7.2's postcopy-preempt) opens its channels first of all; the source would
        wait for them for ever.  The migration fails, the source's guest goes on."""
        await self._listener.second_channel()
        self._end(second_channel(self.memory.control.postcopy_state.name))

    async def stop_listening(self) -> None:
        """A newer source opens postcopy-preempt's channel as it switches.  It takes a refused
        connection well, but not (10.0.2) a stream that breaks at that moment."""
        assert self._second is not None
        if self._second.cancel() and self._listener.is_second_silent():
            self._end(second_channel(self.memory.control.postcopy_state.name))
        self._listener.close()

    def _announce(self) -> None:
        self._on_listening(self._listener.address)
        if self.settings.status_fd is not None:
            try:
                os.write(self.settings.status_fd, b"1")
            except OSError as error:
                raise UsageError(
                    f"status descriptor {self.settings.status_fd}: {error.strerror}"
                ) from error

    async def _or_cancelled(self, wanted: Coroutine):
        """The result of `wanted`, unless trouble or quit() comes first."""
        task = asyncio.ensure_future(wanted)
        quit_ = asyncio.ensure_future(self._cancelled.wait())
        try:
            await asyncio.wait({task, quit_}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._trouble or Cancelled("ended before a source connected")
        finally:
            task.cancel()
            quit_.cancel()
            # What follows may be the end of what the task works with.
            await asyncio.gather(task, quit_, return_exceptions=True)

    def _open_recording(self) -> int:
        if self.settings.record is None:
            return -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            fd = os.open(self.settings.record, flags, 0o600)
        except OSError as error:
            raise HostError(f"record to {self.settings.record}: {error.strerror}") from error
        self._exit.callback(os.close, fd)
        return fd

    async def last_word(self) -> None:
        """Lets control clients that are connected ask how it ended, for a moment."""
        if self._qmp is not None and not self._cancelled.is_set():
            await self._qmp.idle(LAST_WORD_SECONDS)

    async def retire(self) -> None:
        """The migration has completed: no worker and no attach socket is needed any more."""
        await self._stop_watching()  # it would take the guest's end for a failure
        await self._shards.stop()
        if self._attach is not None:
            await self._attach.close()

    async def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def _fail(self, error: ShardedPcError) -> None:
        self.error = error
        if not self.memory.control.totals.ended_ns:
            self.memory.control.note_ended()
        cancelled = isinstance(error, Cancelled)
        status = MigrationStatus.CANCELLED if cancelled else MigrationStatus.FAILED
        self.memory.control.status = status
        self.status_changed(status)
        if self.destination is not None:
            await self._stop_watching()
            await self.destination.end()  # first: it has no use for the news
        if self._attach is not None:
            await self._attach.failed(str(error))

    def quit(self) -> None:
        """Ends the migration now (QMP quit, signals)."""
        self._end(Cancelled("ended on request"))

    def _on_trouble(self, error: ShardError) -> None:
        self._end(error)

    def _end(self, error: ShardedPcError) -> None:
        self._trouble = self._trouble or error
        self._stop.set()
        self._cancelled.set()

    def info(self) -> dict:
        """As `query-migrate`."""
        received = self.memory.received_pages() if self.memory.geometry else []
        error = str(self.error) if self.error else None
        over = is_over(self.memory.control.status)
        huge = self._huge_pages.mapped(self._guest_pids()) if over else None
        return migration_info(self.memory.name, self.memory.control, received, error, huge)

    def status_changed(self, status: MigrationStatus) -> None:
        if self._qmp is not None:
            self._qmp.event("MIGRATION", {"status": status.value})

    # What the stream asks for

    async def define(self, blocks: tuple[RamBlock, ...]) -> Sequence[Alias]:
        geometry = Geometry.of(blocks, self.settings.workers, self.settings.stripe_bytes)
        host.require_memory(geometry.total)
        placement, reason = host.choose_placement(self.settings.placement, geometry.total)
        log.info("placement %s: %s", placement, reason)
        if self.settings.reserve and placement is Placement.COPY:
            raise HostError(f"--reserve needs placement continue: {reason}")
        reserve = self.settings.reserve
        await asyncio.to_thread(self.memory.define, geometry, placement, reason, reserve=reserve)
        for index, block in enumerate(self.memory.blocks):
            self.guests.use_block(index, block.fd)
        if placement is Placement.CONTINUE:
            self._populator.start()
        await self._shards.tell("geometry")
        if self._attach is not None:
            self._attach.geometry_known()
        if self.destination is not None:
            # Nothing more is read before it is up: a destination that cannot run ends the migration
            # while the source's guest still can, even if the source is told to switch at once.
            await self._or_cancelled(self.destination.start(self.machine))
            self._watching = asyncio.create_task(self._watch(self.destination))
        return self._populator.aliases

    async def _watch(self, destination: QemuDestination) -> None:
        """A destination that ends before everything has arrived ends the migration."""
        try:
            await destination.lost()
        except ShardedPcError as error:
            if self._loading:  # that meets the same end, and knows what it means
                await asyncio.wait({self._loading}, timeout=LOAD_ENDS_SECONDS)
            self._end(error)

    async def load_devices(self, data: bytes) -> None:
        assert self.destination is not None
        self._loading = asyncio.current_task()
        try:
            if self._readying is not None:
                await self._or_cancelled(asyncio.shield(self._readying))
            await self.destination.resume(self.machine, data)
        except ShardedPcError as error:
            self._end(error)
            raise

    def request_pages(self, block: int, page: int, count: int) -> None:
        """Asks the source for pages that nobody faulted on."""
        name = self.memory.geometry.blocks[block].name
        if self._return_path is not None:
            for message in return_path.req_span(page * PAGE_BYTES, count * PAGE_BYTES, name):
                self._return_path.post(message)

    def open_return_path(self) -> None:
        if self._return_path is not None:
            return
        assert self._wire is not None
        self._return_path = ReturnPath(self.memory.control, self._wire.back_fd)
        self._return_thread = threading.Thread(target=self._send_back, name="return-path")
        self._return_thread.start()

    def _send_back(self) -> None:
        assert self._return_path is not None
        try:
            self._return_path.loop()
        except HostError as error:
            # The stream's thread meets the same broken wire and says what it means.
            log.warning("%s", error)

    def post(self, message: bytes) -> None:
        assert self._return_path is not None
        try:
            self._return_path.post(message)
        except HostError:  # ENOBUFS
            raise RemoteProtocolError(
                "the source does not read its return path: too many answers to it wait"
            ) from None

    async def _end_return_path(self) -> None:
        if self._return_path is not None:
            self._return_path.stop()
            await asyncio.to_thread(self._return_thread.join)

    async def prepare_discard(self) -> None:
        await self._shards.tell("prepare")

    async def listen(self) -> None:
        assert self._wire is not None
        if _is_socket(self._wire.back_fd):
            await self._shards.tell("listen", True, fd=self._wire.back_fd)
        else:
            await self._shards.tell("listen")
        if self._return_path is not None:
            self._return_path.arm()
        self._readying = asyncio.create_task(self._make_ready())
        self._exit.callback(self._readying.cancel)

    async def _make_ready(self) -> None:
        """Guests may run once nothing stands in memory that is not received."""
        shards = self.memory.control.shards()
        if any(shard.unpunched for shard in shards):
            blocks = range(len(self.memory.blocks))
            spans = [(b, page, n) for b in blocks for page, n in self.memory.unpunched(b)]
            awaited = AwaitedPages(self.memory, spans)
            log.warning(
                "%d pages could not be dropped (huge pages of /dev/shm that somebody uses); guests "
                "wait until they have come again", len(awaited),
            )  # fmt: skip
            await awaited.arrive(self.request_pages)
        if self._attach is not None:
            self._attach.ready()

    async def release_guests(self) -> None:
        """All pages are here: guests run on plain shared memory from now on."""
        if self._attach is not None:
            await self._attach.completed(huge_pages=self._huge_pages.here())

    def _guest_pids(self) -> frozenset[int]:
        return self._attach.pids if self._attach is not None else frozenset()

    # What the attach server asks for

    async def _add_guest(
        self, slot: int, addresses: list[int], mode: int, uffds: list[int]
    ) -> None:
        processes = self._shards.processes
        self.guests.add(slot, uffds, addresses)
        await asyncio.gather(
            *(
                process.tell("guest", slot, addresses, mode, fd=fd)
                for process, fd in zip(processes, uffds, strict=True)
            )
        )

    async def _drop_guest(self, slot: int, release: bool) -> None:
        try:
            await self._shards.tell("drop", slot, release)
        finally:
            self.guests.drop(slot)
