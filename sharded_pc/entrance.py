"""Where the source of a new migration comes in, and what its stream is recorded to."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from sharded_pc.address import Address
from sharded_pc.connection import Connection
from sharded_pc.ending import Ending
from sharded_pc.errors import HostError
from sharded_pc.memory import GuestMemory
from sharded_pc.settings import Settings
from sharded_pc.transport.incoming import listen

if TYPE_CHECKING:
    from sharded_pc.transport.tls.door import Door


class Entrance:
    """Opens the recording, then listens; HostError, UsageError."""

    def __init__(self, settings: Settings, door: Door | None) -> None:
        assert settings.incoming is not None
        self.record_fd = -1
        with contextlib.ExitStack() as opened:
            if settings.record is not None:
                self.record_fd = open_recording(settings.record)
                opened.callback(os.close, self.record_fd)
            self._listener = listen(settings.incoming, door=door)
            opened.callback(self._listener.close)
            self._opened = opened.pop_all()

    @property
    def address(self) -> Address:
        """Where it listens, with the port that the kernel gave."""
        return self._listener.address

    async def connection(self, memory: GuestMemory, ending: Ending) -> Connection:
        """The first that a source opens."""
        wire = await ending.unless_over(self._listener.accept())
        return Connection(wire, self._listener, memory, ending)

    def close(self) -> None:
        self._opened.close()


def open_recording(path: str) -> int:
    """HostError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        raise HostError(f"record to {path}: {error.strerror}") from error
