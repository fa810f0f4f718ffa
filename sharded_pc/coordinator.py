"""The coordinator: owns the memory, the workers and the guests of one receiver.

One asyncio loop for everything that is not bytes of RAM: workers, guests, control clients, signals.
What comes and goes within it has rooms of its own: the migration (migration.py), a source's
connection (connection.py) with two threads beside the loop, the stream (incoming.py; RAM records in
C without the GIL) and the return path (in C).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sharded_pc import host, runtime_folder
from sharded_pc.address import Address, DeferAddress
from sharded_pc.attach.server import AttachServer
from sharded_pc.ending import Ending
from sharded_pc.entrance import Entrance
from sharded_pc.errors import (
    Cancelled,
    GuestLost,
    HostError,
    ShardedPcError,
    UsageError,
)
from sharded_pc.huge_pages import HugePages
from sharded_pc.memory import GuestMemory
from sharded_pc.migration import Migration
from sharded_pc.monitors import Monitors, Receiving
from sharded_pc.native.guests import Guests
from sharded_pc.observe.status import is_over, receiver_info
from sharded_pc.populate import Populator
from sharded_pc.settings import Settings
from sharded_pc.shards import Shards
from sharded_pc.state import MigrationStatus
from sharded_pc.tenure import Tenure
from sharded_pc.transport.doorway import Doorway

if TYPE_CHECKING:
    from sharded_pc.destination import QemuDestination

__all__ = ["Coordinator", "Settings"]

CANCELLED, FAILED = MigrationStatus.CANCELLED, MigrationStatus.FAILED


class Coordinator:
    """One receiver, used once: `async with Coordinator(settings) as c: info = await c.receive()`.

    `on_listening(address)` is called when a source may connect, or, with None, when a dead
    receiver's migration was taken up.
    """

    def __init__(
        self,
        settings: Settings,
        on_listening: Callable[[Address | None], None] = lambda address: None,
    ) -> None:
        self.settings = settings
        self._on_listening = on_listening
        self._exit = contextlib.AsyncExitStack()
        self._ending = Ending()
        self._tenure: Tenure | None = None
        self.memory: GuestMemory
        self.shards: Shards
        self.migration: Migration
        self._monitors: Monitors
        self._doorway = Doorway()
        self.error: ShardedPcError | None = None
        self.resumes = False
        """a dead receiver's migration"""

    @property
    def destination(self) -> QemuDestination | None:
        return self.migration.destination

    async def __aenter__(self) -> Coordinator:
        """Everything that can fail before a source connects: host, sockets, memory, workers."""
        try:
            await self._set_up()
        except BaseException as error:
            if self._tenure is not None:
                self._tenure.keeps_for_another = not isinstance(error, GuestLost)
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._exit.aclose()

    async def _set_up(self) -> None:
        settings, callback = self.settings, self._exit.callback
        host.require_host(kernel_faults=bool(settings.qemu))
        callback(self._ending.close)
        # Behind everybody who connects: it is closed when all connections are.
        self._exit.push_async_callback(self._doorway.close)
        self._doorway.require(settings.tls)
        tenure = self._tenure = Tenure(settings)
        callback(tenure.leave)
        self.memory, self.resumes = tenure.memory, tenure.resumes
        self._guests = Guests(self.memory.control)
        callback(self._guests.close)
        populator = Populator(self.memory)
        self._huge_pages = HugePages(self.memory, populator)
        callback(populator.close)
        if not self.resumes:
            self._expect_source()
        await self._start_shards()
        self.migration = Migration(
            settings, self.memory, self.shards, populator, self._huge_pages, self._ending,
            lambda status: self._monitors.tell(status), self._doorway,
        )  # fmt: skip
        connections = self.migration.connections
        receiving = Receiving(
            self.info, self._status, self._open, self._awaited_at, self.quit, connections,
            self._doorway,
        )  # fmt: skip
        self._monitors = Monitors(receiving, self._exit)
        self.shards.on_restart = lambda: connections.worker_restarted(self.shards.pids())
        self.shards.on_trouble = connections.trouble
        if self.resumes:
            await self.migration.take_up(tenure.guests_before)
        await self._open_sockets()
        await self._make_destination()
        self._exit.push_async_callback(self.migration.close)

    def _expect_source(self) -> None:
        settings = self.settings
        if settings.qemu:
            _check_destination(settings.qemu)
        self._entrance = Entrance(settings, self._doorway, self._opened)
        self._exit.callback(self._entrance.close)
        if not isinstance(settings.incoming, DeferAddress):
            self.memory.control.status = MigrationStatus.SETUP

    def _opened(self) -> None:
        """`migrate-incoming` has said where the source comes."""
        self.memory.control.status = MigrationStatus.SETUP
        self._monitors.tell(MigrationStatus.SETUP)

    async def _start_shards(self) -> None:
        count = self.memory.control.view.n_shards
        self.shards = Shards(self.memory, count, self._guests)
        self._exit.push_async_callback(self.shards.stop)
        self.shards.on_trouble = self._ending.because
        await self.shards.ready()

    async def _open_sockets(self) -> None:
        try:
            if self.settings.attach is not None:
                self._serve_guests(self.settings.attach)
            if self.settings.control is not None:
                await self._monitors.serve(self.settings.control)
        except OSError as error:
            raise HostError(f"make a socket: {error.strerror or error}") from error

    def _open(self, uri: Address) -> None:
        if self.resumes:
            raise UsageError("The incoming migration has already been started")
        self._entrance.open(uri)

    def _serve_guests(self, path: str) -> None:
        shards, patience = self.shards, self.settings.attach_step_seconds
        server = AttachServer(path, self.memory, shards.add_guest, shards.drop_guest, patience)
        self._exit.push_async_callback(server.close)
        shards.on_guest_trouble = server.guests.broken
        self.migration.attach = server

    async def _make_destination(self) -> None:
        known = self.memory.control.destination if self.resumes else None
        if not self.settings.qemu and known is None:
            return
        assert self.migration.attach is not None
        ask, attached = self.migration.connections.ask_again, self.migration.attach.guests.guest_of
        destination = _destination(self.settings, self.memory, ask, attached, self._exit)
        self._monitors.relay(destination, self.settings, resumed=self.resumes)
        self._exit.push_async_callback(destination.end)
        self.migration.destination = destination
        if known is not None:
            await destination.adopt(*known)
            await self._monitors.meet_again()
            self.migration.watch()
        else:
            await self.migration.start_destination()

    def _status(self) -> tuple[MigrationStatus, str | None]:
        error = self.error or self.migration.connections.paused_by
        return self.memory.control.status, str(error) if error else None

    def _awaited_at(self) -> Address | None:
        where = self.migration.connections.awaited_at
        return where if self.resumes or where is not None else self._entrance.address

    # The migration

    async def receive(self) -> dict:
        """Waits for a source, receives it whole, and answers migration_info.
        Raises what failed; `info()` tells then as well."""
        try:
            if self.resumes:
                self._started(None)
                await self.migration.resume()
            else:
                self._started(self._entrance.address)
                coming = self._entrance.connection(self.memory, self._ending)
                await self.migration.receive(await coming)
        except ShardedPcError as error:
            await self._fail(error)
            raise
        return self.info()

    def _started(self, address: Address | None) -> None:
        self._on_listening(address)
        tell_started(self.settings.status_fd)
        self.shards.keep_spares()

    def quit(self) -> None:
        """Ends the migration now (QMP quit, signals)."""
        self._ending.because(Cancelled("ended on request"))

    async def _fail(self, error: ShardedPcError) -> None:
        self.error = error
        if not self.memory.control.totals.ended_ns:
            self.memory.control.note_ended()
        status = CANCELLED if isinstance(error, Cancelled) else FAILED
        self.memory.control.status = status
        self._monitors.tell(status)
        await self.migration.close()
        await self._monitors.failed()
        if self.destination is not None:
            await self.destination.end()  # first: it has no use for the news
        if self.migration.attach is not None:
            await self.migration.attach.failed(str(error))

    async def last_word(self) -> None:
        """Lets control clients that are connected ask how it ended, for a moment."""
        if not self._ending.is_over:
            await self._monitors.last_word()

    async def retire(self) -> None:
        """The migration has completed: no worker and no attach socket is needed any more."""
        await self.migration.close()  # it would take the guest's end for a failure
        await self._monitors.leave()
        await self.shards.stop()
        if self.migration.attach is not None:
            await self.migration.attach.close()
        await self._doorway.close()

    def info(self) -> dict:
        """As `query-migrate`."""
        control, error = self.memory.control, self.error or self.migration.connections.paused_by
        pids = self.migration.guest_pids
        huge = self._huge_pages.mapped(pids) if is_over(control.status) else None
        return receiver_info(self.memory, error, huge)


def _check_destination(arguments: tuple[str, ...]) -> None:
    from sharded_pc.destination import check  # needs a QMP client, `receive` does not

    check(arguments)


def _destination(
    settings: Settings,
    memory: GuestMemory,
    ask: Callable[[], None],
    attached: Callable[[int], int | None],
    exit_: contextlib.AsyncExitStack,
) -> QemuDestination:
    from sharded_pc.destination import QemuDestination  # needs a QMP client, `receive` does not
    from sharded_pc.destination.process import QemuProcess

    assert settings.attach is not None
    monitor, stream = (
        Path(runtime_folder.runtime_path(settings.name, what))
        for what in (runtime_folder.MONITOR, runtime_folder.STREAM)
    )
    for path in (monitor, stream):  # a QEMU that is killed leaves them
        exit_.callback(path.unlink, missing_ok=True)
    return QemuDestination(
        settings.qemu, memory, (monitor, stream), settings.attach, ask, attached,
        settings.launch or QemuProcess.start,
    )  # fmt: skip


def tell_started(status_fd: int | None) -> None:
    """One byte, if anybody waits for it; UsageError."""
    if status_fd is not None:
        try:
            os.write(status_fd, b"1")
        except OSError as error:
            raise UsageError(f"status descriptor {status_fd}: {error.strerror}") from error
