"""The way back to a source: its return path, and the thread that writes there."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from concurrent.futures import Future

from sharded_pc import threads
from sharded_pc.errors import HostError, RemoteProtocolError
from sharded_pc.memory import GuestMemory
from sharded_pc.native.return_path import ReturnPath

log = logging.getLogger(__name__)


class WayBack:
    """Of one connection, open once the source has asked for it; `fd` is the wire's."""

    def __init__(self, memory: GuestMemory, fd: int) -> None:
        self._memory = memory
        self._fd = fd
        self._return_path: ReturnPath | None = None
        self._end: Future | None = None

    @property
    def requests_fd(self) -> int:
        """Where fault loops may send requests themselves; -1: nowhere."""
        return self._fd if self._fd >= 0 and stat.S_ISSOCK(os.fstat(self._fd).st_mode) else -1

    @property
    def is_open(self) -> bool:
        return self._return_path is not None

    def open(self) -> None:
        if self._return_path is None:
            self._return_path = ReturnPath(self._memory.control, self._fd)
            self._end = threads.run(self._send, "return-path")

    def arm(self) -> None:
        """Pages may be requested from now on; those that wait already are."""
        if self._return_path is not None:
            self._return_path.arm(self._memory.received, self._memory.requested)

    def ask_again(self) -> None:
        """Asks the source for everything that is requested and not received."""
        if self._return_path is not None:
            self._return_path.again()

    def post(self, message: bytes) -> None:
        """Sends a return-path message."""
        assert self._return_path is not None
        try:
            self._return_path.post(message)
        except HostError:  # ENOBUFS
            raise RemoteProtocolError(
                "the source does not read its return path: too many answers to it wait"
            ) from None

    def send_bitmap(self, block: int) -> None:
        """Sends a block's received bitmap."""
        assert self._return_path is not None
        self._return_path.bitmap(self._memory.received, block)

    def _send(self) -> None:
        assert self._return_path is not None
        try:
            self._return_path.loop()
        except HostError as error:
            # The stream's thread meets the same broken wire and says what it means.
            log.warning("%s", error)

    async def end(self) -> None:
        if self._return_path is not None and self._end is not None:
            self._return_path.stop()
            await asyncio.wrap_future(self._end)
