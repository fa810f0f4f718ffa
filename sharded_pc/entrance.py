"""Where the source of a new migration comes in, and what its stream is recorded to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from sharded_pc.address import Address, DeferAddress
from sharded_pc.connection import Connection
from sharded_pc.ending import Ending
from sharded_pc.errors import UsageError
from sharded_pc.memory import GuestMemory
from sharded_pc.recording import Recording
from sharded_pc.settings import Settings
from sharded_pc.transport.doorway import Doorway
from sharded_pc.transport.incoming import Listener, listen


class Entrance:
    """Opens the recording, then listens, unless `migrate-incoming` is to say where: then
    `on_open()` is called when it has.  HostError, UsageError."""

    def __init__(self, settings: Settings, doorway: Doorway, on_open: Callable[[], None]) -> None:
        assert settings.incoming is not None
        self._doorway = doorway
        self._on_open = on_open
        self._listener: Listener | None = None
        self._listens = asyncio.Event()
        self._recording: Recording | None = None
        with contextlib.ExitStack() as opened:
            if settings.record is not None:
                self._recording = Recording(settings.record)
                opened.callback(self._recording.close)
            if not isinstance(settings.incoming, DeferAddress):
                self._listen(settings.incoming)
            self._opened = opened.pop_all()

    def _listen(self, address: Address) -> None:
        self._listener = listen(address, door=self._doorway.door)
        self._listens.set()

    def open(self, address: Address) -> None:
        """`migrate-incoming`; UsageError, HostError."""
        if self._listener is not None:
            raise UsageError("The incoming migration has already been started")
        if isinstance(address, DeferAddress):
            raise UsageError(f"{address}: expected where the source comes")
        self._listen(address)
        self._on_open()

    @property
    def address(self) -> Address:
        """Where it listens, with the port that the kernel gave."""
        return DeferAddress() if self._listener is None else self._listener.address

    async def connection(self, memory: GuestMemory, ending: Ending) -> Connection:
        """The first that a source opens."""
        await ending.unless_over(self._listens.wait())
        assert self._listener is not None
        wire = await ending.unless_over(self._listener.accept())
        return Connection(wire, self._listener, memory, ending, recording=self._recording)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._opened.close()
