"""The attach socket: guests come, hand over their userfaultfds, and go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from sharded_pc.attach import protocol
from sharded_pc.attach.mappings import check_mapped
from sharded_pc.errors import AttachError, HostError, ShardedPcError, ShardError
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
EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6
"""UFFD_FEATURE_EVENT_FORK, REMAP, REMOVE, UNMAP: a fork's event installs a descriptor in whoever
reads it, and a pending one stops every placement."""
USERFAULTFD = "anon_inode:[userfaultfd]"
"""What /proc/self/fd says of one; no file's path can."""


class AttachServer:
    """Serves one receiver's attach socket.

    `add(slot, addresses, mode, uffds)` and `drop(slot, release)` tell the workers; both are
    serialised here for each guest.  The coordinator says when things are known: geometry_known(),
    ready(), completed(), failed().  A client that says nothing for `step_seconds` in the middle of
    the hand-over is dropped.
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
        self._add = add
        self._drop = drop
        self._step_seconds = step_seconds
        self._sock = bind_unix(path)
        self._geometry = asyncio.Event()
        self._ready = asyncio.Event()
        self._over = asyncio.Event()
        self._last_word = protocol.event(protocol.COMPLETED)
        self._guests: dict[int, socket.socket] = {}
        self._broken: dict[int, str] = {}
        """what a worker said of a guest that is not admitted yet"""
        self._pids: set[int] = set()
        """processes that have finished the hand-over, now or before"""
        self._free = list(range(MAX_GUESTS))
        self._admission = asyncio.Lock()
        """of the workers' learning of a guest: nothing ends in the middle of it"""
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

    @property
    def pids(self) -> frozenset[int]:
        """Processes that have finished the hand-over, now or before."""
        return frozenset(self._pids)

    async def failed(self, text: str) -> None:
        """Missing pages will not come from this receiver."""
        await self._end(protocol.event(protocol.FAILED, text), release=False)

    async def _end(self, word: dict, *, release: bool) -> None:
        if self._over.is_set():
            return
        self._last_word = word
        self._over.set()
        async with self._admission:  # one that is being admitted is let go by its own task
            for slot in list(self._guests):
                await self._forget(slot, release=release)
        self._geometry.set()
        self._ready.set()

    def broken(self, slot: int, text: str) -> None:
        """A worker cannot serve this guest."""
        sock = self._guests.get(slot)
        if sock is None:  # one worker finds out while another still learns of the guest
            self._broken[slot] = text
        else:
            log.warning("guest %d dropped: %s", slot, text)
            _tell(sock, protocol.error(text))
            sock.shutdown(socket.SHUT_RDWR)

    def guest_of(self, pid: int) -> int | None:
        """The process that has handed its userfaultfds over: `pid` or a child of it."""
        return next((each for each in self._pids if pid in _ancestry(each)), None)

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
            _tell(client, protocol.error(str(error)))
        except OSError as error:
            log.warning("attach given up: %s", error)
        finally:
            inbox.close()
            client.close()

    async def _talk(self, client: socket.socket, inbox: fds.Inbox) -> None:
        modes = protocol.check_attach(await self._message(client, inbox))
        if inbox.fds:  # they would be held until a source comes
            raise AttachError(f"{len(inbox.fds)} descriptors came before they were asked for")
        gone = asyncio.create_task(_end_of(client))
        try:
            if not await _first(self._geometry.wait(), gone):
                return
        finally:
            await _cancel(gone)
        ram = self._memory.geometry
        if ram is None:
            raise AttachError(self._last_word.get("desc") or "there is no RAM")
        over = self._over.is_set()
        mode = protocol.choose_mode(self._memory.placement, modes)
        offer = protocol.geometry(self._memory.name, ram, None if over else mode)
        fds.send(client, offer, [block.fd for block in self._memory.blocks])
        addresses = protocol.check_mappings(await self._message(client, inbox), ram)
        if over:
            self._pids.add(peer_of(client).pid)
            _tell(client, {"attached": {"guest": -1}})
            _tell(client, self._last_word)
            return
        await self._serve_guest(client, inbox, ram, addresses, mode)

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
        ram: Geometry,
        addresses: list[int],
        mode: str,
    ) -> None:
        async with self._admission:
            slot = await self._admit(client, inbox.take_fds(), ram, addresses, mode)
        try:
            await self._follow(client, slot)
        finally:
            # Shielded: the workers must forget this guest even if we are being closed.
            await asyncio.shield(self._forget(slot, release=False))

    async def _admit(
        self,
        client: socket.socket,
        uffds: list[int],
        ram: Geometry,
        addresses: list[int],
        mode: str,
    ) -> int:
        try:
            if len(uffds) != ram.shards:
                raise AttachError(
                    f"{len(uffds)} userfaultfds handed over, expected one for each of "
                    f"{ram.shards} shards"
                )
            _check_uffds(uffds)
            check_mapped(peer_of(client).pid, self._memory.blocks, addresses)
            if not self._free:
                raise AttachError(f"{MAX_GUESTS} guests are attached already; close one first")
            slot = self._free.pop(0)
            self._broken.pop(slot, None)
            try:
                await self._add(slot, addresses, protocol.MODES[mode], uffds)
            except (ShardError, HostError, OSError) as error:
                await self._drop(slot, False)
                self._free.append(slot)
                raise AttachError(str(error)) from None
        finally:
            for fd in uffds:
                os.close(fd)
        self._guests[slot] = client
        self._pids.add(peer_of(client).pid)
        self._memory.control.note_guest(slot, peer_of(client).pid)
        _tell(client, {"attached": {"guest": slot}})
        if slot in self._broken:
            self.broken(slot, self._broken.pop(slot))
        if self._over.is_set():
            await self._forget(slot, release="desc" not in self._last_word)
        return slot

    async def _follow(self, client: socket.socket, slot: int) -> None:
        """Tells READY, then waits for the guest to leave."""
        gone = asyncio.create_task(_end_of(client))
        try:
            if slot in self._guests and await _first(self._ready.wait(), gone):
                if slot in self._guests:
                    _tell(client, protocol.event(protocol.READY))
                await gone
        finally:
            await _cancel(gone)

    async def _forget(self, slot: int, *, release: bool) -> None:
        client = self._guests.pop(slot, None)
        if client is None:
            return
        with contextlib.suppress(ShardError):
            await self._drop(slot, release)
        if self._over.is_set():
            _tell(client, self._last_word)
        self._free.append(slot)
        self._memory.control.note_guest(slot, 0)


def _ancestry(pid: int) -> Iterator[int]:
    """The process and its parents."""
    while pid > 1:
        yield pid
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()  # its name need not be text
        except OSError:
            return
        pid = int(stat.rpartition(b")")[2].split()[1])


def _check_uffds(uffds: list[int]) -> None:
    for fd in uffds:
        kind = os.readlink(f"/proc/self/fd/{fd}")
        if kind != USERFAULTFD:
            raise AttachError(f"descriptor handed over is {kind}, expected a userfaultfd")
        if _features(fd) & EVENTS:
            raise AttachError(
                "a userfaultfd with events (fork, remap, remove, unmap) cannot be served"
            )


def _features(fd: int) -> int:
    """UFFD_FEATURE_* bits that a userfaultfd was opened with (Linux fs/userfaultfd.c,
    userfaultfd_show_fdinfo: "API: api:features:supported")."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("API:"):
            return int(line.split(":")[2], 16)
    return 0


def _tell(client: socket.socket, message: dict) -> None:
    """Small and rare, so the socket's buffer takes it; a client that is gone needs no answer."""
    with contextlib.suppress(OSError):
        fds.send(client, message)


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
