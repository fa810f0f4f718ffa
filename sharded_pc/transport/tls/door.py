"""The coordinator's end of the process in which TLS ends (serving.py).

A process that died took its connections along, as a cut of the network would; the next connection
finds a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import socket
from multiprocessing.process import BaseProcess

from sharded_pc import processes
from sharded_pc.errors import HostError, RemoteProtocolError
from sharded_pc.transport import fds
from sharded_pc.transport.tls import serving
from sharded_pc.transport.tls.credentials import Credentials

log = logging.getLogger(__name__)

MAX_SAID_BYTES = 1 << 16
TELL_SECONDS = 1.0
DIED = "its TLS process died"
STOP_SECONDS = 8.0
"""Longer than the process takes to send the rest."""


class PlainEnd(socket.socket):
    """What is inside one connection's TLS.  `peer` says where the connection comes from, `name` who
    it is by its certificate."""

    peer = ""
    name = ""
    leash: socket.socket | None = None

    def broken_by(self) -> str | None:
        """Once the stream has ended: why, if it was not in order.  That is told before the end; a
        process that dies closes its descriptors one after the other."""
        assert self.leash is not None
        poll = select.poll()
        poll.register(self.leash, select.POLLIN)
        if not poll.poll(TELL_SECONDS * 1000):
            return None
        said = self.leash.recv(MAX_SAID_BYTES, socket.MSG_PEEK)
        return json.loads(said)["broken"] if said else DIED

    def close(self) -> None:
        if self.leash is not None:
            self.leash.close()
        super().close()


class Door:
    """Its process starts with start(), or the first connection."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._process: BaseProcess | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Once the credentials are checked: UsageError."""
        self._credentials.check()
        self._spawn()

    def _spawn(self) -> None:
        self._process, conn = processes.start(serving.main, self._credentials, name="tls")
        self._control = socket.socket(fileno=os.dup(conn.fileno()))
        conn.close()

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
        log.info("TLS with %s, %s", peer, end.name or "by a shared key")
        return end

    def _hand_over(self, sock: socket.socket, peer: str) -> PlainEnd:
        control = self._running()
        leash, its_leash = socket.socketpair(type=socket.SOCK_SEQPACKET)
        ours, its_end = socket.socketpair()
        end = PlainEnd(fileno=ours.detach())
        end.peer, end.leash = peer, leash
        for each in (end, leash):
            each.setblocking(False)
        with sock, its_leash, its_end:
            try:
                fds.send(control, {"peer": peer}, [s.fileno() for s in (sock, its_end, its_leash)])
            except OSError as error:
                end.close()
                raise HostError(f"hand a connection to the TLS process: {error.strerror}") from None
        return end

    async def _answer(self, end: PlainEnd) -> dict[str, str]:
        assert end.leash is not None
        async with asyncio.timeout(2 * serving.HANDSHAKE_SECONDS):  # it keeps to the time itself
            await fds.readable(end.leash)
        raw = end.leash.recv(MAX_SAID_BYTES)
        if not raw:
            raise RemoteProtocolError(DIED)
        said = json.loads(raw)
        if "refused" in said:
            raise RemoteProtocolError(said["refused"])
        return said

    def _running(self) -> socket.socket:
        if self._process is not None and not self._process.is_alive():
            log.warning("the TLS process died (exit code %s)", self._process.exitcode)
            self._forget()
        if self._process is None:
            self._spawn()
        assert self._control is not None
        return self._control

    def _forget(self) -> None:
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.join()
            self._process.close()
        self._process = self._control = None

    async def close(self) -> None:
        """Connections have ended, or their plain ends would not be closed; never raises."""
        if self._process is None or self._control is None:
            return
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(self._process.join, STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
        self._forget()
