"""What a service manager wants to hear (sd_notify(3)): ready, alive, on its way out.

Lines of NAME=VALUE as one datagram to the socket that NOTIFY_SOCKET names; nobody listens where it
is not set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket


class ServiceManager:
    """`async with ServiceManager() as manager`: while it lives, the watchdog hears of our event
    loop as often as WATCHDOG_USEC asks for."""

    def __init__(self) -> None:
        self._path = os.environ.get("NOTIFY_SOCKET", "")
        self._beating: asyncio.Task | None = None

    async def __aenter__(self) -> ServiceManager:
        if (seconds := self._watchdog_seconds()) > 0:
            self._beating = asyncio.create_task(self._beat(seconds / 2))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.tell("STOPPING=1")
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    def ready(self, what: str) -> None:
        """From now on others may come; `what` is shown by `systemctl status`."""
        self.tell("READY=1", f"STATUS={what}")

    def tell(self, *lines: str) -> None:
        """Never raises, never waits: whoever does not listen misses it."""
        if not self._path:
            return
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
        ):
            sock.sendto("\n".join(lines).encode(), address)

    def _watchdog_seconds(self) -> float:
        """0: there is none, or it is another process's."""
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = os.environ.get("WATCHDOG_USEC", "")
        return int(usec) / 1e6 if ours and usec.isdigit() else 0.0

    async def _beat(self, seconds: float) -> None:
        while True:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(seconds)
