"""The coordinator's end of the process in which TLS ends (process.py).

A process that died took its connections along, as a cut of the network would; the next connection
finds a new one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import select
import socket
from collections.abc import Callable

from sharded_pc.errors import HostError, RemoteProtocolError
from sharded_pc.transport import fds
from sharded_pc.transport.tls import serving
from sharded_pc.transport.tls.credentials import Credentials
from sharded_pc.transport.tls.process import TlsProcess

log = logging.getLogger(__name__)

MAX_SAID_BYTES = 1 << 16
TELL_SECONDS = 1.0


class PlainEnd(socket.socket):
    """What is inside one connection's TLS.  `peer` says where the connection comes from, `name` who
    it is by its certificate, or by whose key."""

    peer = ""
    name = ""
    leash: socket.socket | None = None
    obituary: Callable[[], str]
    """of the process that has its TLS, once that has ended"""

    def broken_by(self) -> str | None:
        """Once the stream has ended: why, if it was not in order.  That is told before the end; a
        process that dies closes its descriptors one after the other."""
        assert self.leash is not None
        poll = select.poll()
        poll.register(self.leash, select.POLLIN)
        if not poll.poll(TELL_SECONDS * 1000):
            return None
        said = self.leash.recv(MAX_SAID_BYTES, socket.MSG_PEEK)
        return json.loads(said)["broken"] if said else self.obituary()

    def close(self) -> None:
        if self.leash is not None:
            self.leash.close()
        super().close()


class Door:
    """Its process starts with start(), or the first connection."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self.process: TlsProcess | None = None

    def start(self) -> None:
        """Once the credentials are checked: UsageError."""
        self._credentials.check()
        self.process = TlsProcess(self._credentials)

    async def open(self, sock: socket.socket, peer: str) -> PlainEnd:
        """`sock`, of `peer`, through the handshake; it becomes the process's.  RemoteProtocolError
        says why not; HostError."""
        end = self._hand_over(sock, peer)
        try:
            said = await self._answer(end)
        except BaseException:
            end.close()
            raise
        end.name = said["name"]
        log.info("TLS with %s, %s", peer, end.name)
        return end

    def _hand_over(self, sock: socket.socket, peer: str) -> PlainEnd:
        process = self._running()
        leash, its_leash = socket.socketpair(type=socket.SOCK_SEQPACKET)
        ours, its_end = socket.socketpair()
        end = PlainEnd(fileno=ours.detach())
        end.peer, end.leash, end.obituary = peer, leash, process.obituary
        for each in (end, leash):
            each.setblocking(False)
        with sock, its_leash, its_end:
            try:
                process.send({"peer": peer}, [s.fileno() for s in (sock, its_end, its_leash)])
            except HostError:
                end.close()
                raise
        return end

    async def _answer(self, end: PlainEnd) -> dict[str, str]:
        assert end.leash is not None
        async with asyncio.timeout(2 * serving.HANDSHAKE_SECONDS):  # it keeps to the time itself
            await fds.readable(end.leash)
        raw = end.leash.recv(MAX_SAID_BYTES)
        if not raw:
            raise RemoteProtocolError(end.obituary())
        said = json.loads(raw)
        if "refused" in said:
            raise RemoteProtocolError(said["refused"])
        return said

    def _running(self) -> TlsProcess:
        if self.process is not None and not self.process.is_alive():
            log.warning("the TLS process died (exit code %s)", self.process.exitcode)
            self.process.bury()
            self.process = None
        if self.process is None:
            self.process = TlsProcess(self._credentials)
        assert self.process is not None
        return self.process

    async def close(self) -> None:
        """Connections have ended, or their plain ends would not be closed; never raises."""
        process, self.process = self.process, None
        if process is not None:
            await process.end()
