"""A paused migration's way to its next connection.

Its words are QEMU's (migration/migration.c qmp_migrate_recover, qmp_migrate_pause): the operator
says `migrate-recover` here and `migrate` with `resume` at the source, or the source comes to the
address that was given beforehand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sharded_pc.address import Address, DeferAddress, FileAddress
from sharded_pc.ending import Ending
from sharded_pc.errors import HostError, UsageError
from sharded_pc.state import MigrationStatus
from sharded_pc.transport.doorway import Doorway
from sharded_pc.transport.incoming import Listener, Wire, listen

log = logging.getLogger(__name__)


class Recovery:
    """One receiver's; a pause begins with accept(), and ends with what it answers.

    `tell` hears each status, and is to set it; sources come through the `doorway`.
    """

    def __init__(
        self,
        uri: Address | None,
        doorway: Doorway,
        ending: Ending,
        tell: Callable[[MigrationStatus], None],
    ) -> None:
        self._uri = uri
        self._doorway = doorway
        self._ending = ending
        self._tell = tell
        self._is_paused = False
        self._listener: Listener | None = None
        self._new_listener = asyncio.Event()

    async def accept(self) -> tuple[Wire, Listener]:
        """The wire on which the source goes on, whenever that is; raises what ends the receiver."""
        self._is_paused = True
        self._tell(MigrationStatus.POSTCOPY_PAUSED)
        try:
            self._listen_unasked()
            while True:
                wire = await self._ending.unless_over(self._next())
                if wire is not None:
                    assert self._listener is not None
                    listener, self._listener = self._listener, None
                    self._tell(MigrationStatus.POSTCOPY_RECOVER)
                    return wire, listener
        finally:
            self._is_paused = False
            self.close()

    def recover(self, uri: Address) -> None:
        """`migrate-recover`: the source comes there; instead of where it was awaited, if it was.
        UsageError, HostError."""
        if not self._is_paused:
            raise UsageError("Migrate recover can only be run when postcopy is paused.")
        if isinstance(uri, DeferAddress):
            raise UsageError(f"{uri}: expected where the source comes")
        if isinstance(uri, FileAddress):
            raise UsageError(f"{uri}: a file has no way back to the source")
        was_awaited = self._listener is not None
        self.close()  # it may be the same address
        try:
            self._listener = listen(uri, recovers=True, door=self._doorway.door)
        except (HostError, UsageError):
            if was_awaited:  # it is not any more
                self._tell(MigrationStatus.POSTCOPY_PAUSED)
            raise
        self._new_listener.set()
        log.warning("the source may go on at %s", self._listener.address)
        self._tell(MigrationStatus.POSTCOPY_RECOVER_SETUP)

    @property
    def address(self) -> Address | None:
        return None if self._listener is None else self._listener.address

    def close(self) -> None:
        """The source is not awaited any more."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _listen_unasked(self) -> None:
        """Where the user said beforehand; `migrate-recover` can still choose another place."""
        if self._uri is not None:
            try:
                self.recover(self._uri)
            except (HostError, UsageError) as error:
                log.error("the source cannot come to the --recover-uri: %s", error)

    async def _next(self) -> Wire | None:
        """None: it is awaited elsewhere now."""
        self._new_listener.clear()
        changed = asyncio.ensure_future(self._new_listener.wait())
        coming = asyncio.ensure_future(self._listener.accept()) if self._listener else None
        try:
            waits = {changed} if coming is None else {changed, coming}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if coming is None or not coming.done():
                return None
            if coming.exception() is None:
                return coming.result()
            log.error("the source is awaited no more: %s", coming.exception())
            self.close()
            self._tell(MigrationStatus.POSTCOPY_PAUSED)
            return None
        finally:
            for each in filter(None, (changed, coming)):
                each.cancel()
            await asyncio.gather(*filter(None, (changed, coming)), return_exceptions=True)
