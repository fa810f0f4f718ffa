"""One process in which TLS ends (serving.py), from its start to its end, and who looks after it.

Its death is the end of its connections, which everybody notices.  While it is stopped, or hangs,
nothing ends: so it is looked at, and asked.  It is ended then, and its connections with it; for a
guest that runs here this is a pause, which an operator has to end.  So it is given more time than
a worker, whose successor goes on by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket

from sharded_pc import processes
from sharded_pc.errors import HostError
from sharded_pc.transport import fds
from sharded_pc.transport.tls import serving
from sharded_pc.transport.tls.credentials import Credentials

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
STOPPED_SECONDS = 1.0
SILENT_SECONDS = 10.0
"""Without an answer.  It needs the processor and Python's lock for one, as all its connections do.
Both are counted in looks: while we were stopped ourselves nobody looked."""
STOP_SECONDS = 8.0
"""Longer than the process takes to send the rest."""
MAX_ANSWER_BYTES = 99


class TlsProcess:
    """Running; made and ended in an event loop."""

    def __init__(self, credentials: Credentials) -> None:
        self._process, conn = processes.start(serving.main, credentials, name="tls")
        self._control = socket.socket(fileno=os.dup(conn.fileno()))
        conn.close()
        self.pid = self._process.pid
        self._reason = ""
        self._stopped = self._silent = 0
        """looks"""
        self._is_asked = False
        self._has_answered = asyncio.Event()
        self._watching = asyncio.create_task(self._watch())

    def send(self, message: object, descriptors: list[int]) -> None:
        """HostError."""
        try:
            fds.send(self._control, message, descriptors)
        except OSError as error:
            raise HostError(f"hand a connection to the TLS process: {error.strerror}") from None

    async def ready(self) -> None:
        """Returns when it could serve a connection at once; also if it takes too long for that."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_answered.wait(), SILENT_SECONDS)

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def obituary(self) -> str:
        """What became of it; from any thread."""
        if self._reason:
            return f"its TLS process was ended: {self._reason}"
        return "its TLS process died"

    def bury(self) -> None:
        """It has ended."""
        self._watching.cancel()
        self._control.close()
        self._process.join()
        self._process.close()

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    async def end(self) -> None:
        """Connections have ended, or their plain ends would not be closed; never raises."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(self._process.join, STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
        self.bury()

    # Whether it goes on

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        self._stopped = self._stopped + 1 if self._is_stopped() else 0
        self._silent = 0 if self._answers() else self._silent + 1
        if self._stopped * LOOK_SECONDS >= STOPPED_SECONDS:
            self._kill("it was stopped (SIGSTOP)")
        elif self._silent * LOOK_SECONDS >= SILENT_SECONDS:
            self._kill(f"it hung, no sign of life for {SILENT_SECONDS:g} s")

    def _is_stopped(self) -> bool:
        what = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, what) is not None
        return False

    def _answers(self) -> bool:
        """To what it was asked at a look before; asks again if so."""
        with contextlib.suppress(OSError):  # BlockingIOError: not yet; else its end is at hand
            if not self._is_asked or self._control.recv(MAX_ANSWER_BYTES, socket.MSG_DONTWAIT):
                if self._is_asked:
                    self._has_answered.set()
                self._is_asked = True
                fds.send(self._control, serving.PING)
                return True
        return False

    def _kill(self, reason: str) -> None:
        if not self._reason:
            self._reason = reason
            log.warning("the TLS process (pid %d) is ended: %s", self.pid, reason)
            self._process.kill()
