"""Taking connections off a listening socket, also when that does not work for a while.

accept(2): ECONNABORTED is a peer that went away in the queue; a lack of descriptors or memory, a
firewall's no and what the network said of a peer are somebody else's doing and pass.  None of it
may make a receiver deaf.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket

from sharded_pc.transport.fds import readable
from sharded_pc.transport.peers import peer_of

log = logging.getLogger(__name__)

BACKLOG = 16
PAUSE_SECONDS = 0.2
"""Between two tries; the connection stays in the queue."""
_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_OF_THE_NETWORK = {
    errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT, errno.ENONET, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip
_PASSES = _SHORT | _OF_THE_NETWORK


class Acceptor:
    """Everybody who connects to a non-blocking listening socket, which stays the caller's."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_told = False

    async def accept(self) -> socket.socket:
        """The next connection, non-blocking.  OSError only for what no waiting mends."""
        while True:
            try:
                if (found := self.take()) is not None:
                    return found
                await readable(self._sock)
            except OSError as error:
                if error.errno not in _PASSES:
                    raise
                self._tell(error)
                await asyncio.sleep(PAUSE_SECONDS)

    async def accept_streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As accept(), for who reads and writes by asyncio's streams."""
        return await asyncio.open_unix_connection(sock=await self.accept())

    @property
    def on_the_way(self) -> list[str]:
        """Whence those come who are accepted and cannot be taken yet."""
        return []

    def close(self) -> None:
        """Nobody takes any more; who was not taken is let go."""

    def take(self) -> socket.socket | None:
        """One that waits in the queue already, if there is one."""
        while True:
            try:
                found, _ = self._sock.accept()
            except BlockingIOError:
                return None
            except ConnectionAbortedError:
                continue
            self._is_told = False
            found.setblocking(False)
            return found

    def _tell(self, error: OSError) -> None:
        """Once each time, not at every try."""
        if not self._is_told:
            where = self._sock.getsockname()
            log.warning("no connection can be taken at %s: %s; trying again", where, error.strerror)
        self._is_told = True


class TrustedAcceptor(Acceptor):
    """Of a Unix socket: only those who could do anything to us anyway.  The socket's mode and its
    folder's keep others away; this is for the day on which somebody has opened both."""

    def take(self) -> socket.socket | None:
        while (found := super().take()) is not None:
            peer = peer_of(found)
            if peer.is_trusted:
                return found
            found.close()
            log.warning(
                "connection to %s refused: process %d belongs to uid %d",
                self._sock.getsockname(), peer.pid, peer.uid,
            )  # fmt: skip
        return None
