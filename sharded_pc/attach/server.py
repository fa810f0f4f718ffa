"""The attach socket: guests come, hand over their userfaultfds, and go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from sharded_pc.attach import protocol
from sharded_pc.attach.guests import AttachedGuests, tell
from sharded_pc.backend_segments import BackendSegments
from sharded_pc.errors import AttachError, ShardedPcError
from sharded_pc.geometry import Geometry
from sharded_pc.memory import GuestMemory
from sharded_pc.native.control import MAX_GUESTS
from sharded_pc.transport import fds
from sharded_pc.transport.accepting import TrustedAcceptor
from sharded_pc.transport.incoming import bind_unix
from sharded_pc.transport.peers import peer_of

log = logging.getLogger(__name__)

STEP_SECONDS = 10.0
MAX_CLIENTS = 4 * MAX_GUESTS
"""At a time: guests, and others in the hand-over, whose silence ends after `step_seconds`.  More
wait in the queue, so that they cannot take all descriptors."""


class AttachServer:
    """Serves one receiver's attach socket.

    `add` and `drop` tell the workers (guests.py).  The coordinator says when things are known:
    geometry_known(), ready(), completed(), failed().  A client that says nothing for
    `step_seconds` in the middle of the hand-over is dropped.
    """

    def __init__(
        self,
        path: str,
        memory: GuestMemory,
        add: Callable[[int, list[int], int, list[int]], Awaitable[None]],
        drop: Callable[[int, bool], Awaitable[None]],
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        self.path = path
        self._memory = memory
        self.guests = AttachedGuests(memory, add, drop)
        self._step_seconds = step_seconds
        self._sock = bind_unix(path)
        self._geometry = asyncio.Event()
        self._ready = asyncio.Event()
        self._room = asyncio.Semaphore(MAX_CLIENTS)
        self._clients: set[asyncio.Task] = set()
        self._accepting = asyncio.create_task(self._accept())

    def geometry_known(self) -> None:
        self._geometry.set()

    def ready(self) -> None:
        """Faults are answered from now on."""
        self._ready.set()

    async def completed(self, *, huge_pages: bool = False) -> None:
        """Every page is here: releases all guests and tells them."""
        await self._end(protocol.completed(huge_pages=huge_pages), release=True)

    async def failed(self, text: str) -> None:
        """Missing pages will not come from this receiver."""
        await self._end(protocol.event(protocol.FAILED, text), release=False)

    async def _end(self, word: dict, *, release: bool) -> None:
        if self.guests.last_word is None:
            await self.guests.end(word, release=release)
            self._geometry.set()
            self._ready.set()

    async def close(self) -> None:
        """Removes the socket; clients see the end of the stream.  A second call does nothing."""
        if self._sock.fileno() < 0:
            return
        self._accepting.cancel()
        for task in self._clients:
            task.cancel()
        await asyncio.gather(self._accepting, *self._clients, return_exceptions=True)
        self._sock.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    async def _accept(self) -> None:
        acceptor = TrustedAcceptor(self._sock)
        while True:
            await self._room.acquire()
            task = asyncio.create_task(self._serve(await acceptor.accept()))
            self._clients.add(task)
            task.add_done_callback(self._leave)

    def _leave(self, task: asyncio.Task) -> None:
        self._clients.discard(task)
        self._room.release()

    async def _serve(self, client: socket.socket) -> None:
        inbox = fds.Inbox()
        try:
            await self._talk(client, inbox)
        except ShardedPcError as error:
            log.warning("attach refused: %s", error)
            tell(client, protocol.error(str(error)))
        except OSError as error:
            log.warning("attach given up: %s", error)
        finally:
            inbox.close()
            client.close()

    async def _talk(self, client: socket.socket, inbox: fds.Inbox) -> None:
        hello = await self._message(client, inbox)
        modes = protocol.check_attach(hello)
        pid = protocol.pid_of(hello) or peer_of(client).pid
        if inbox.fds:  # they would be held until a source comes
            raise AttachError(f"{len(inbox.fds)} descriptors came before they were asked for")
        backends = self._memory.backends
        if protocol.is_early(hello) and backends is not None and not self._geometry.is_set():
            await self._serve_destination(client, inbox, pid, backends, modes)
            return
        gone = asyncio.create_task(_end_of(client))
        try:
            if not await _first(self._geometry.wait(), gone):
                return
        finally:
            await _cancel(gone)
        ram, last_word = self._memory.geometry, self.guests.last_word
        if ram is None:
            raise AttachError((last_word or {}).get("desc") or "there is no RAM")
        mode = protocol.choose_mode(self._memory.placement, modes)
        offer = protocol.geometry(self._memory.name, ram, mode if last_word is None else None)
        fds.send(client, offer, [block.fd for block in self._memory.blocks])
        addresses = protocol.check_mappings(await self._message(client, inbox), ram)
        if last_word is not None:
            self.guests.note(pid)
            tell(client, {"attached": {"guest": -1}})
            tell(client, last_word)
            return
        await self._serve_guest(client, inbox, pid, ram, addresses, mode)

    async def _serve_destination(
        self,
        client: socket.socket,
        inbox: fds.Inbox,
        pid: int,
        backends: BackendSegments,
        modes: list,
    ) -> None:
        """Before the block list: it registers its backends, and the workers are told later
        (admit_destination)."""
        ram, mode = backends.geometry, protocol.choose_mode(backends.placement, modes)
        offer = protocol.geometry(self._memory.name, ram, mode)
        fds.send(client, offer, [segment.fd for segment in backends.segments])
        addresses = protocol.check_mappings(await self._message(client, inbox), ram)
        slot = self.guests.reserve(client, pid, inbox.take_fds(), backends, addresses, mode)
        try:
            await self._follow(client, slot)
        finally:
            await asyncio.shield(self.guests.forget(slot, release=False))

    async def _message(self, client: socket.socket, inbox: fds.Inbox) -> object:
        message = fds.receive_message_async(client, inbox)
        try:
            answer = await asyncio.wait_for(message, self._step_seconds)
        except TimeoutError:
            seconds = f"{self._step_seconds:g} s"
            raise AttachError(
                f"the client said nothing for {seconds} in the middle of the hand-over"
            ) from None
        if answer is None:
            raise ConnectionError("the client went away in the middle of the hand-over")
        return answer

    async def _serve_guest(
        self,
        client: socket.socket,
        inbox: fds.Inbox,
        pid: int,
        ram: Geometry,
        addresses: list[int],
        mode: str,
    ) -> None:
        slot = await self.guests.admit(client, pid, inbox.take_fds(), ram, addresses, mode)
        try:
            await self._follow(client, slot)
        finally:
            # Shielded: the workers must forget this guest even if we are being closed.
            await asyncio.shield(self.guests.forget(slot, release=False))

    async def _follow(self, client: socket.socket, slot: int) -> None:
        """Tells READY, then waits for the guest to leave."""
        gone = asyncio.create_task(_end_of(client))
        try:
            if slot in self.guests and await _first(self._ready.wait(), gone):
                if slot in self.guests:
                    tell(client, protocol.event(protocol.READY))
                await gone
        finally:
            await _cancel(gone)


async def _end_of(client: socket.socket) -> None:
    """Returns when the client closes its end; what it says meanwhile is ignored."""
    while True:
        await fds.readable(client)
        try:
            if not client.recv(4096):
                return
        except BlockingIOError:
            continue
        except OSError:
            return


async def _first(wanted: Awaitable, gone: asyncio.Task) -> bool:
    """Waits for either; true if `wanted` came."""
    task = asyncio.ensure_future(wanted)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        await _cancel(task)


async def _cancel(task: asyncio.Future) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
