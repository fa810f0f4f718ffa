"""What the connections of a source pass, as it is when one is awaited: TLS's door, or nothing.

It is there without TLS too, for who manages a destination QEMU may ask for TLS later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharded_pc.transport.tls.credentials import Credentials
    from sharded_pc.transport.tls.door import Door


class Doorway:
    """One receiver's.  `door`: what the next connections pass."""

    def __init__(self) -> None:
        self.door: Door | None = None
        self._credentials: Credentials | None = None
        self._made: list[Door] = []
        """connections may be behind each"""

    def require(self, credentials: Credentials | None) -> None:
        """Of the next connections; None: they are plain.  UsageError."""
        if credentials == self._credentials:
            return
        if credentials is None:
            self.door = None
        else:
            from sharded_pc.transport.tls.door import Door  # ssl is loaded where it is used

            door = Door(credentials)
            door.start()
            self._made.append(door)
            self.door = door
        self._credentials = credentials

    async def prepare(self, credentials: Credentials | None) -> None:
        """As require(); the next handshake need not wait for a process that begins."""
        self.require(credentials)
        if self.door is not None and self.door.process is not None:
            await self.door.process.ready()

    async def close(self) -> None:
        """Connections have ended; never raises."""
        for each in self._made:
            await each.close()
