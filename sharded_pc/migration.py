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
from sharded_pc.attach.guests import AttachedGuests
from sharded_pc.attach.server import AttachServer
from sharded_pc.awaited import unpunched
from sharded_pc.backend_segments import BackendSegments
from sharded_pc.connection import Connection
from sharded_pc.connections import Connections
from sharded_pc.ending import Ending
from sharded_pc.errors import AttachError, ConnectionLost, HostError, ShardedPcError
from sharded_pc.geometry import Geometry, Placement, RamBlock
from sharded_pc.huge_pages import HugePages
from sharded_pc.loop_calls import from_stream
from sharded_pc.memory import GuestMemory
from sharded_pc.native.alias import Alias
from sharded_pc.native.guests import Guests
from sharded_pc.populate import Populator
from sharded_pc.settings import Settings
from sharded_pc.shards import Shards
from sharded_pc.state import MigrationStatus
from sharded_pc.transport.doorway import Doorway
from sharded_pc.wire.machine import awaits_switchover_ack

if TYPE_CHECKING:
    from sharded_pc.destination import QemuDestination

log = logging.getLogger(__name__)

LOAD_ENDS_SECONDS = 2.0
"""From a destination's exit to the end of loading its devices."""


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
        doorway: Doorway,
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
        self.connections = Connections(
            memory, settings.recover_uri, doorway, ending, on_status, shards.revive
        )
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

    async def receive(self, connection: Connection) -> None:
        """Everything that comes over the connection, and over others if it is lost while the guest
        runs; then guests run on plain memory."""
        self._memory.control.note_started()
        await self.connections.receive(self, connection)
        await self._finish()

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
        if self.attach is not None:
            self.attach.geometry_known()
        self._readying = asyncio.create_task(self._make_ready())
        why = ConnectionLost("the receiver died and was resumed")
        await self.connections.resume(self, why)
        await self._finish()

    async def _finish(self) -> None:
        if self.attach is not None:
            await self.attach.guests.back(self._guests_before)
        await self._release_guests()
        await self._huge_pages.settle(self.guest_pids)

    @property
    def guest_pids(self) -> frozenset[int]:
        return self.attach.guests.pids if self.attach is not None else frozenset()

    async def close(self) -> None:
        """Nothing of it goes on; the destination does."""
        tasks = [task for task in (self._watching, self._readying) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def configured(self, machine: str) -> None:
        self._machine = machine

    @property
    def acks_switchover(self) -> bool:
        return self._settings.switchover_ack and awaits_switchover_ack(self._machine)

    def status_changed(self, status: MigrationStatus) -> None:
        self.loop.call_soon_threadsafe(self._on_status, status)

    # The block list

    @from_stream
    async def define(self, blocks: tuple[RamBlock, ...]) -> None:
        if self.destination is not None:
            await self._define_for(self.destination, blocks)
        else:
            geometry = Geometry.of(blocks, self._settings.workers, self._settings.stripe_bytes)
            host.require_memory(geometry.total)
            await _make_memory(self._memory, self._settings, geometry)
        self._use_blocks()
        self._start_populating()
        await self._shards.tell("geometry")
        if self.attach is not None:
            assert self._memory.geometry is not None
            await self._admit_reserved(self.attach.guests, self._memory.geometry)
            self.attach.geometry_known()
        if self.destination is not None:
            # Nothing more is read before it is known to fit: a destination that cannot run ends the
            # migration while the source's guest still can, even if the source is told to switch at
            # once.
            assert self.connections.current is not None
            fitting = self.destination.await_stream(self._machine)
            await self.connections.current.ending.unless_over(fitting)

    async def _admit_reserved(self, guests: AttachedGuests, geometry: Geometry) -> None:
        """What a worker says of a QEMU that has just died is no more than a consequence."""
        try:
            await guests.admit_reserved(geometry)
        except AttachError:
            if self._watching is not None:
                await asyncio.wait({self._watching}, timeout=LOAD_ENDS_SECONDS)
            if self._ending.is_over:
                raise self._ending.reason from None
            raise

    async def _define_for(self, destination: QemuDestination, blocks: Sequence[RamBlock]) -> None:
        """The memory of a QEMU that is up: its backends' segments, then what else there is."""
        backends = self._memory.backends
        assert backends is not None
        found = destination.match(blocks)
        geometry = backends.whole(found, blocks)
        host.require_memory(geometry.total - backends.geometry.total)
        await asyncio.to_thread(
            self._memory.define, geometry, backends.placement, backends.placement_reason,
            reserve=self._settings.reserve, first=backends.hand_over(found),
        )  # fmt: skip

    def _use_blocks(self) -> None:
        for index, block in enumerate(self._memory.blocks):
            self.guests.use_block(index, block.fd)

    def _start_populating(self) -> None:
        if self._memory.placement is Placement.CONTINUE:
            self._populator.start()

    async def start_destination(self) -> None:
        """Before a source comes: memory for its backends, then QEMU itself.  HostError, UsageError,
        QemuFailed."""
        settings = self._settings
        assert self.destination is not None
        own = Geometry.of(self.destination.backends(), settings.workers, settings.stripe_bytes)
        host.require_memory(own.total)
        placement = _choose_placement(settings, own.total)
        self._memory.backends = await asyncio.to_thread(
            BackendSegments.make, self._memory.name, own, placement, reserve=settings.reserve
        )
        await self._ending.unless_over(self.destination.start())
        self.watch()

    async def give_channel(self, number: int, fd: int, record: str | None) -> int:
        return await self._shards.give_channel(number, fd, record)

    # The switch

    @from_stream
    async def prepare_discard(self) -> None:
        await self._shards.tell("prepare")

    @from_stream
    async def listen(self) -> None:
        """Also when a paused migration goes on."""
        connection = self.connections.current
        assert connection is not None
        fd = connection.back.requests_fd
        if fd >= 0:
            await self._shards.tell("listen", True, fd=fd)
        else:
            await self._shards.tell("listen")
        connection.back.arm()
        self.connections.paused_by = None
        if self._readying is None:
            self._readying = asyncio.create_task(self._make_ready())

    async def _make_ready(self) -> None:
        """Guests may run once nothing stands in memory that is not received."""
        left = unpunched(self._memory)
        if left:
            log.warning(
                "%d pages could not be dropped (huge pages of /dev/shm that somebody uses); guests "
                "wait until they have come again", len(left),
            )  # fmt: skip
            await left.arrive(self.connections.ask_again)
        if self.attach is not None:
            self.attach.ready()

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


async def _make_memory(memory: GuestMemory, settings: Settings, geometry: Geometry) -> None:
    placement, reason = _choose_placement(settings, geometry.total)
    await asyncio.to_thread(memory.define, geometry, placement, reason, reserve=settings.reserve)


def _choose_placement(settings: Settings, total: int) -> tuple[Placement, str]:
    placement, reason = host.choose_placement(settings.placement, total)
    log.info("placement %s: %s", placement, reason)
    if settings.reserve and placement is Placement.COPY:
        raise HostError(f"--reserve needs placement continue: {reason}")
    return placement, reason
