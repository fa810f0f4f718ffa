"""A migration's connections, one after the other: what is a pause, and what is the end.

Words and errors are QEMU's (migration/migration.c qmp_migrate_recover, qmp_migrate_pause).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from sharded_pc.address import Address
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
from sharded_pc.incoming import Receiver
from sharded_pc.memory import GuestMemory
from sharded_pc.recovery import Recovery
from sharded_pc.state import MigrationStatus, PostcopyState
from sharded_pc.transport.doorway import Doorway

log = logging.getLogger(__name__)

PAUSES = (ConnectionLost, RemoteProtocolError, HostError, ShardError)
"""What ends a connection, and not a migration whose guest runs (as QEMU since 7.0: any error)."""


class Connections:
    """`on_status` hears each status; `on_next()` is called before the source goes on."""

    def __init__(
        self,
        memory: GuestMemory,
        recover_uri: Address | None,
        doorway: Doorway,
        ending: Ending,
        on_status: Callable[[MigrationStatus], None],
        on_next: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._ending = ending
        self._on_status = on_status
        self._on_next = on_next
        self._recovery = Recovery(recover_uri, doorway, ending, self._set_status)
        self.current: Connection | None = None
        self.paused_by: ShardedPcError | None = None

    async def receive(self, receiver: Receiver, connection: Connection) -> None:
        """Everything that comes over the connection, and over others if it is lost while the guest
        runs; raises what is no pause."""
        while True:
            self.current = connection
            try:
                await connection.receive(receiver)
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
                self.current = None
                connection.close()
            connection = await self._next()

    async def resume(self, receiver: Receiver, why: ConnectionLost) -> None:
        """Begins with a pause."""
        self._pause(why)
        await self.receive(receiver, await self._next())

    def _can_pause(self) -> bool:
        """The guest runs here: the source cannot go on with it, and has what is missing."""
        return self._memory.control.postcopy_state is PostcopyState.RUNNING

    def _pause(self, error: ShardedPcError) -> None:
        self.paused_by = error
        self._memory.control.note_back_lost()
        missing = self._memory.missing_pages()
        log.warning(
            "paused: %s; the guest goes on, and waits for %d missing pages: say migrate-recover at "
            "the control socket, then migrate with resume at the source", error, missing,
        )  # fmt: skip

    async def _next(self) -> Connection:
        """The one on which the source goes on; ConnectionLost if the operator gives up."""
        try:
            wire, listener = await self._recovery.accept()
        except Cancelled as error:
            raise ConnectionLost(f"{error} while paused: {self.paused_by}") from None
        self._on_next()
        return Connection(wire, listener, self._memory, self._ending, resumes=True)

    def ask_again(self) -> None:
        """Asks the source for all pages that are requested and not received; while there is no
        source, that is done when there is one."""
        if self.current is not None:
            self.current.back.ask_again()

    def worker_restarted(self, pids: Sequence[int]) -> None:
        """`pids`: those that serve now."""
        self.ask_again()
        if self.current is not None:
            self.current.look_at_workers(pids)

    def recover(self, uri: Address) -> None:
        """`migrate-recover`; UsageError, HostError."""
        self._recovery.recover(uri)

    @property
    def awaited_at(self) -> Address | None:
        """Where the source of a paused migration may come again."""
        return self._recovery.address

    def pause(self) -> None:
        """`migrate-pause`; UsageError."""
        active = (MigrationStatus.POSTCOPY_ACTIVE, MigrationStatus.POSTCOPY_RECOVER)
        if self._memory.control.status not in active:
            raise UsageError(
                "migrate-pause is currently only supported during postcopy-active or "
                "postcopy-recover state"
            )
        if self.current is None or not self._can_pause():
            raise UsageError("Failed to pause destination migration: its guest does not run yet")
        self.current.ending.because(ConnectionLost("paused on request"))

    def trouble(self, error: ShardedPcError) -> None:
        """Something is broken here that the migration needs: it pauses if its guest runs."""
        if not self._can_pause():
            self._ending.because(error)
        elif self.current is not None:
            self.current.ending.because(error)
        else:
            log.error("while paused: %s", error)

    def _set_status(self, status: MigrationStatus) -> None:
        self._memory.control.status = status
        self._on_status(status)
