"""One migration into a receiver: what the stream asks for, and the destination that takes it on.

The receiver's memory, workers and guests are there before it and after it; connections come and go
within it.  Methods under `from_stream` are the stream's thread's (incoming.Receiver).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from sharded_pc import host
from sharded_pc.address import Address
from sharded_pc.attach.server import AttachServer
from sharded_pc.awaited import AwaitedPages
from sharded_pc.connection import Connection
from sharded_pc.ending import Ending
from sharded_pc.errors import (
    Cancelled,
    ConnectionLost,
    HostError,
    RemoteProtocolError,
    ShardedPcError,
    ShardError,
    UsageError,
)
from sharded_pc.geometry import PAGE_BYTES, Geometry, Placement, RamBlock
from sharded_pc.huge_pages import HugePages
from sharded_pc.loop_calls import from_stream
from sharded_pc.memory import GuestMemory
from sharded_pc.native.alias import Alias
from sharded_pc.native.guests import Guests
from sharded_pc.populate import Populator
from sharded_pc.processes import is_alive
from sharded_pc.recovery import Recovery
from sharded_pc.settings import Settings
from sharded_pc.shards import Shards
from sharded_pc.state import MigrationStatus, PostcopyState

if TYPE_CHECKING:
    from sharded_pc.destination import QemuDestination

log = logging.getLogger(__name__)

LOAD_ENDS_SECONDS = 2.0
"""From a destination's exit to the end of loading its devices."""
GUESTS_BACK_SECONDS = 10.0
"""For a dead receiver's guests to attach again; they try some times in a second."""
LOOK_SECONDS = 0.02
PAUSES = (ConnectionLost, RemoteProtocolError, HostError, ShardError)
"""What ends a connection, and not a migration whose guest runs (as QEMU since 7.0: any error)."""


class Migration:
    """`on_status` hears each status, in the loop.  `attach` and `destination` are there or not."""

    def __init__(
        self,
        settings: Settings,
        memory: GuestMemory,
        shards: Shards,
        populator: Populator,
        huge_pages: HugePages,
        ending: Ending,
        on_status: Callable[[MigrationStatus], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._settings = settings
        self._memory = memory
        self._shards = shards
        self._populator = populator
        self._huge_pages = huge_pages
        self._ending = ending
        self._on_status = on_status
        self.attach: AttachServer | None = None
        self.destination: QemuDestination | None = None
        self._recovery = Recovery(settings.recover_uri, ending, self._set_status)
        self._connection: Connection | None = None
        self.paused_by: ShardedPcError | None = None
        self._guests_before: frozenset[int] = frozenset()
        """those of a dead receiver whose migration this was"""
        self._machine = ""
        self._watching: asyncio.Task | None = None
        self._loading: asyncio.Task | None = None
        self._readying: asyncio.Task | None = None

    @property
    def guests(self) -> Guests:
        return self._shards.guests

    @property
    def aliases(self) -> Sequence[Alias]:
        return self._populator.aliases

    async def receive(self, connection: Connection, record_fd: int) -> None:
        """Everything that comes over the connection, and over others if it is lost while the guest
        runs; then guests run on plain memory."""
        self._memory.control.note_started()
        await self._over(connection, record_fd)
        await self._finish()

    async def _over(self, connection: Connection, record_fd: int) -> None:
        while True:
            self._connection = connection
            try:
                await connection.receive(self, record_fd)
                return
            except PAUSES as error:
                connection.hang_up()
                if self._ending.is_over or not self._can_pause():
                    raise
                self._pause(error)
            except ShardedPcError:
                connection.hang_up()
                raise
            finally:
                self._connection = None
                record_fd = -1  # a recording is one stream
                connection.close()
            connection = await self._recovered()

    # Pause and recovery

    def _can_pause(self) -> bool:
        """The guest runs here: the source cannot go on with it, and has what is missing."""
        return self._memory.control.postcopy_state is PostcopyState.RUNNING

    def _pause(self, error: ShardedPcError) -> None:
        self.paused_by = error
        self._memory.control.note_back_lost()
        missing = self._memory.geometry.total // PAGE_BYTES - sum(self._memory.received_pages())
        log.warning(
            "paused: %s; the guest goes on, and waits for %d missing pages: say migrate-recover at "
            "the control socket, then migrate with resume at the source", error, missing,
        )  # fmt: skip

    async def _recovered(self) -> Connection:
        try:
            wire, listener = await self._recovery.accept()
        except Cancelled as error:
            raise ConnectionLost(f"{error} while paused: {self.paused_by}") from None
        self._shards.revive()
        return Connection(wire, listener, self._memory, self._ending, resumes=True)

    def recover(self, uri: Address) -> None:
        """`migrate-recover`; UsageError, HostError."""
        self._recovery.recover(uri)

    def pause(self) -> None:
        """`migrate-pause`; UsageError."""
        active = (MigrationStatus.POSTCOPY_ACTIVE, MigrationStatus.POSTCOPY_RECOVER)
        if self._memory.control.status not in active:
            raise UsageError(
                "migrate-pause is currently only supported during postcopy-active or "
                "postcopy-recover state"
            )
        if self._connection is None or not self._can_pause():
            raise UsageError("Failed to pause destination migration: its guest does not run yet")
        self._connection.ending.because(ConnectionLost("paused on request"))

    def trouble(self, error: ShardedPcError) -> None:
        """Something is broken here that the migration needs: it pauses if its guest runs."""
        if not self._can_pause():
            self._ending.because(error)
        elif self._connection is not None:
            self._connection.ending.because(error)
        else:
            log.error("while paused: %s", error)

    def _set_status(self, status: MigrationStatus) -> None:
        self._memory.control.status = status
        self._on_status(status)

    async def take_up(self, guests: frozenset[int]) -> None:
        """A dead receiver's migration, whose guest runs: workers go on with what is in shared
        memory, before the `guests` that it had attach again."""
        self._guests_before = guests
        self._use_blocks()
        self._start_populating()
        await self._shards.tell("geometry")
        await self._shards.tell("listen")

    async def resume(self) -> None:
        """What receive() does, from the pause on."""
        self._pause(ConnectionLost("the receiver died and was resumed"))
        if self.attach is not None:
            self.attach.geometry_known()
        self._readying = asyncio.create_task(self._make_ready())
        await self._over(await self._recovered(), -1)
        await self._finish()

    async def _finish(self) -> None:
        await self._guests_back()
        await self._release_guests()
        await self._huge_pages.settle(self.guest_pids)

    async def _guests_back(self) -> None:
        """Who waits for a dead receiver's word that all is here gets ours."""
        waited = 0.0
        while missing := {pid for pid in self._guests_before - self.guest_pids if is_alive(pid)}:
            if waited >= GUESTS_BACK_SECONDS:
                log.warning("guests %s have not attached again: they may wait for ever", missing)
                return
            await asyncio.sleep(LOOK_SECONDS)
            waited += LOOK_SECONDS

    @property
    def guest_pids(self) -> frozenset[int]:
        return self.attach.pids if self.attach is not None else frozenset()

    async def close(self) -> None:
        """Nothing of it goes on; the destination does."""
        tasks = [task for task in (self._watching, self._readying) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def configured(self, machine: str) -> None:
        self._machine = machine

    def status_changed(self, status: MigrationStatus) -> None:
        self.loop.call_soon_threadsafe(self._on_status, status)

    # The block list

    @from_stream
    async def define(self, blocks: tuple[RamBlock, ...]) -> None:
        geometry = Geometry.of(blocks, self._settings.workers, self._settings.stripe_bytes)
        host.require_memory(geometry.total)
        await self._make_memory(geometry)
        self._use_blocks()
        self._start_populating()
        await self._shards.tell("geometry")
        if self.attach is not None:
            self.attach.geometry_known()
        if self.destination is not None:
            # Nothing more is read before it is up: a destination that cannot run ends the migration
            # while the source's guest still can, even if the source is told to switch at once.
            assert self._connection is not None
            await self._connection.ending.unless_over(self.destination.start(self._machine))
            self.watch()

    def _use_blocks(self) -> None:
        for index, block in enumerate(self._memory.blocks):
            self.guests.use_block(index, block.fd)

    def _start_populating(self) -> None:
        if self._memory.placement is Placement.CONTINUE:
            self._populator.start()

    async def _make_memory(self, geometry: Geometry) -> None:
        reserve = self._settings.reserve
        placement, reason = host.choose_placement(self._settings.placement, geometry.total)
        log.info("placement %s: %s", placement, reason)
        if reserve and placement is Placement.COPY:
            raise HostError(f"--reserve needs placement continue: {reason}")
        await asyncio.to_thread(self._memory.define, geometry, placement, reason, reserve=reserve)

    # The switch

    @from_stream
    async def prepare_discard(self) -> None:
        await self._shards.tell("prepare")

    @from_stream
    async def listen(self) -> None:
        """Also when a paused migration goes on."""
        assert self._connection is not None
        fd = self._connection.requests_fd
        if fd >= 0:
            await self._shards.tell("listen", True, fd=fd)
        else:
            await self._shards.tell("listen")
        self._connection.arm()
        self.paused_by = None
        if self._readying is None:
            self._readying = asyncio.create_task(self._make_ready())

    async def _make_ready(self) -> None:
        """Guests may run once nothing stands in memory that is not received."""
        if any(shard.unpunched for shard in self._memory.control.shards()):
            blocks = range(len(self._memory.blocks))
            spans = [(b, page, n) for b in blocks for page, n in self._memory.unpunched(b)]
            awaited = AwaitedPages(self._memory, spans)
            log.warning(
                "%d pages could not be dropped (huge pages of /dev/shm that somebody uses); guests "
                "wait until they have come again", len(awaited),
            )  # fmt: skip
            await awaited.arrive(self.ask_again)
        if self.attach is not None:
            self.attach.ready()

    def ask_again(self) -> None:
        """Asks the source for all pages that are requested and not received; while there is no
        source, that is done when there is one."""
        if self._connection is not None:
            self._connection.ask_again()

    # The destination

    def load_devices(self, data: bytes) -> Future | None:
        if self.destination is None:
            return None
        loading = self._load_devices(self.destination, data)
        return asyncio.run_coroutine_threadsafe(loading, self.loop)

    async def _load_devices(self, destination: QemuDestination, data: bytes) -> None:
        self._loading = asyncio.current_task()
        try:
            if self._readying is not None:
                await self._ending.unless_over(asyncio.shield(self._readying))
            await destination.resume(self._machine, data)
        except ShardedPcError as error:
            self._ending.because(error)
            raise

    def watch(self) -> None:
        """The destination is there from now on."""
        assert self.destination is not None
        self._watching = asyncio.create_task(self._watch(self.destination))

    async def _watch(self, destination: QemuDestination) -> None:
        """A destination that ends before everything has arrived ends the migration."""
        try:
            await destination.lost()
        except ShardedPcError as error:
            if self._loading:  # that meets the same end, and knows what it means
                await asyncio.wait({self._loading}, timeout=LOAD_ENDS_SECONDS)
            self._ending.because(error)

    # The end

    async def _release_guests(self) -> None:
        """All pages are here: guests run on plain shared memory from now on."""
        if self.attach is not None:
            await self.attach.completed(huge_pages=self._huge_pages.here())

    placed = from_stream(_release_guests)
