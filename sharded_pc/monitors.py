"""Who may ask a receiver how its migration is, and tell it where a source comes: clients of its
control socket and, where somebody manages its QEMU, that one at QEMU's own monitor."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from sharded_pc import runtime_folder
from sharded_pc.address import Address, parse
from sharded_pc.connections import Connections
from sharded_pc.observe.qmp import Command, QmpServer
from sharded_pc.settings import Settings
from sharded_pc.state import MigrationStatus
from sharded_pc.transport.doorway import Doorway

if TYPE_CHECKING:
    from sharded_pc.destination import QemuDestination
    from sharded_pc.destination.management import Management

LAST_WORD_SECONDS = 2.0
"""How long control clients that are connected when the migration ends may ask how it ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class Receiving:
    """The receiver, as monitors need it; what they call raises ShardedPcError."""

    info: Callable[[], dict]
    """as `query-migrate` shows it"""
    status: Callable[[], tuple[MigrationStatus, str | None]]
    """and the reason of a failure or a pause"""
    open: Callable[[Address], None]
    """`migrate-incoming`"""
    awaited_at: Callable[[], Address | None]
    """where a source may come"""
    quit: Callable[[], None]
    connections: Connections
    """for `migrate-recover` and `migrate-pause`"""
    doorway: Doorway
    """of whatever source comes"""


class Monitors:
    """One receiver's; what it makes is closed by `exit_`."""

    def __init__(self, receiving: Receiving, exit_: contextlib.AsyncExitStack) -> None:
        self._receiving = receiving
        self._exit = exit_
        self._qmp: QmpServer | None = None
        self._management: Management | None = None
        self._destination: QemuDestination | None = None

    async def serve(self, path: str) -> None:
        """The control socket; HostError, OSError."""
        self._qmp = QmpServer(path, self._commands())
        self._exit.push_async_callback(self._qmp.close)
        await self._qmp.start()

    def _commands(self) -> list[Command]:
        receiving, connections = self._receiving, self._receiving.connections
        return [
            Command("query-migrate", receiving.info),
            Command("quit", receiving.quit),
            Command("migrate-incoming", lambda uri: receiving.open(parse(uri)), {"uri": str}),
            Command("migrate-recover", lambda uri: connections.recover(parse(uri)), {"uri": str}),
            Command("migrate-pause", connections.pause),
        ]

    def relay(self, destination: QemuDestination, settings: Settings, *, resumed: bool) -> None:
        """Before that QEMU starts: who manages it is heard at its own monitor, if anybody does."""
        if settings.monitor is None:
            return
        from sharded_pc.destination.management import Incoming, Management

        receiving, connections = self._receiving, self._receiving.connections
        incoming = Incoming(
            receiving.open, connections.recover, connections.pause, receiving.status,
            receiving.awaited_at, receiving.doorway.prepare,
        )  # fmt: skip
        path = runtime_folder.runtime_path(settings.name, runtime_folder.RELAY)
        self._management = Management(
            path, destination.monitor, incoming, resumed=resumed, stream_fds=settings.stream_fds
        )
        self._exit.push_async_callback(self._management.close)
        destination.relay_monitor(settings.monitor, path)
        self._destination = destination

    async def meet_again(self) -> None:
        """A dead receiver's QEMU, and who manages it; QemuFailed."""
        if self._management is not None and self._destination is not None:
            await self._destination.meet_again()
            await self._management.take_up()

    # What they are told

    def tell(self, status: MigrationStatus) -> None:
        if self._qmp is not None:
            self._qmp.event("MIGRATION", {"status": status.value})
        if self._management is not None:
            self._management.tell(status)

    async def failed(self) -> None:
        """Before that QEMU ends; see Management.failed()."""
        if self._management is not None and self._destination is not None:
            await self._management.failed(self._destination.exited())

    async def leave(self) -> None:
        """All is here: QEMU's monitor is its own again."""
        if self._management is not None and self._destination is not None:
            await self._management.leave(self._destination.exited())

    async def last_word(self) -> None:
        """Lets control clients that are connected ask how it ended, for a moment."""
        if self._qmp is not None:
            await self._qmp.idle(LAST_WORD_SECONDS)
