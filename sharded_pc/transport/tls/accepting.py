"""A listening socket whose connections come through the door one by one, each in its own time."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from sharded_pc.errors import HostError, RemoteProtocolError
from sharded_pc.transport.accepting import Acceptor
from sharded_pc.transport.peers import origin_of
from sharded_pc.transport.tls.door import Door, PlainEnd

log = logging.getLogger(__name__)

MAX_HANDSHAKES = 128
"""At a time; more wait in the queue."""


class TlsAcceptor:
    """As an Acceptor, but with plain ends.  `prepare` is told of each connection as it comes."""

    def __init__(
        self, sock: socket.socket, door: Door, prepare: Callable[[socket.socket], None]
    ) -> None:
        self._acceptor = Acceptor(sock)
        self._door = door
        self._prepare = prepare
        self._room = asyncio.Semaphore(MAX_HANDSHAKES)
        self._shaking: dict[asyncio.Task, str] = {}
        self._accepting: asyncio.Task | None = None
        self._through: asyncio.Queue[PlainEnd | OSError] = asyncio.Queue()

    async def accept(self) -> socket.socket:
        """The next that came through.  OSError only for what no waiting mends."""
        if self._accepting is None:
            self._accepting = asyncio.create_task(self._accept_all())
        found = await self._through.get()
        if isinstance(found, OSError):
            raise found
        return found

    def take(self) -> socket.socket | None:
        """One that is through, if there is one; those in the queue begin."""
        while (sock := self._acceptor.take()) is not None:
            self._begin(sock)
        return self._ready()

    def _ready(self) -> socket.socket | None:
        found = None if self._through.empty() else self._through.get_nowait()
        return found if isinstance(found, PlainEnd) else None

    @property
    def on_the_way(self) -> list[str]:
        """Whence those come whose handshake is not over."""
        return list(self._shaking.values())

    def close(self) -> None:
        for task in (self._accepting, *self._shaking):
            if task is not None:
                task.cancel()
        while (end := self._ready()) is not None:
            end.close()

    async def _accept_all(self) -> None:
        try:
            while True:
                await self._room.acquire()
                self._begin(await self._acceptor.accept())
        except OSError as error:
            self._through.put_nowait(error)

    def _begin(self, sock: socket.socket) -> None:
        peer = origin_of(sock)
        self._prepare(sock)
        task = asyncio.create_task(self._shake_hands(sock, peer))
        self._shaking[task] = peer
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task) -> None:
        del self._shaking[task]
        self._room.release()

    async def _shake_hands(self, sock: socket.socket, peer: str) -> None:
        try:
            self._through.put_nowait(await self._door.open(sock, peer))
        except (RemoteProtocolError, HostError, TimeoutError) as error:
            log.warning("connection from %s closed: %s", peer, error)
