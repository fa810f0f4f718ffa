"""The guests of one receiver that have handed their userfaultfds over, and those that do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from sharded_pc.attach import protocol
from sharded_pc.attach.mappings import check_mapped
from sharded_pc.backend_segments import BackendSegments
from sharded_pc.errors import AttachError, HostError, ShardError
from sharded_pc.geometry import Geometry
from sharded_pc.memory import GuestMemory
from sharded_pc.native.control import MAX_GUESTS
from sharded_pc.processes import is_alive
from sharded_pc.shm import Segment
from sharded_pc.transport import fds

log = logging.getLogger(__name__)

EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6
"""UFFD_FEATURE_EVENT_FORK, REMAP, REMOVE, UNMAP: a fork's event installs a descriptor in whoever
reads it, and a pending one stops every placement."""
USERFAULTFD = "anon_inode:[userfaultfd]"
"""What /proc/self/fd says of one; no file's path can."""


BACK_SECONDS = 10.0
"""For a dead receiver's guests to attach again; they try some times in a second."""
LOOK_SECONDS = 0.02


@dataclasses.dataclass(frozen=True, slots=True)
class _Reserved:
    """What a destination has handed over before the block list."""

    uffds: list[int]
    addresses: list[int]
    mode: str


class AttachedGuests:
    """`add(slot, addresses, mode, uffds)` and `drop(slot, release)` tell the workers; both are
    serialised here for each guest."""

    def __init__(
        self,
        memory: GuestMemory,
        add: Callable[[int, list[int], int, list[int]], Awaitable[None]],
        drop: Callable[[int, bool], Awaitable[None]],
    ) -> None:
        self._memory = memory
        self._add = add
        self._drop = drop
        self.last_word: dict | None = None
        """how it ended for all of them"""
        self._guests: dict[int, socket.socket] = {}
        self._reserved: dict[int, _Reserved] = {}
        """slots whose guest the workers do not know yet"""
        self._broken: dict[int, str] = {}
        """what a worker said of a guest that is not admitted yet"""
        self._pids: set[int] = set()
        """processes that have finished the hand-over, now or before"""
        self._free = list(range(MAX_GUESTS))
        self._admission = asyncio.Lock()
        """of the workers' learning of a guest: nothing ends in the middle of it"""

    def __contains__(self, slot: int) -> bool:
        return slot in self._guests

    async def end(self, word: dict, *, release: bool) -> None:
        """Lets all of them go, and tells them."""
        self.last_word = word
        async with self._admission:  # one that is being admitted is let go by its own task
            for slot in list(self._guests):
                await self.forget(slot, release=release)

    @property
    def pids(self) -> frozenset[int]:
        """Processes that have finished the hand-over, now or before."""
        return frozenset(self._pids)

    async def back(self, wanted: frozenset[int]) -> None:
        """Returns when these processes, a dead receiver's guests, have attached again or are gone:
        they wait for the word that all is here."""
        waited = 0.0
        while missing := {pid for pid in wanted - self._pids if is_alive(pid)}:
            if waited >= BACK_SECONDS:
                log.warning("guests %s have not attached again: they may wait for ever", missing)
                return
            await asyncio.sleep(LOOK_SECONDS)
            waited += LOOK_SECONDS

    def note(self, pid: int) -> None:
        """It came after the end, and needs nobody."""
        self._pids.add(pid)

    def broken(self, slot: int, text: str) -> None:
        """A worker cannot serve this guest."""
        sock = self._guests.get(slot)
        if sock is None:  # one worker finds out while another still learns of the guest
            self._broken[slot] = text
        else:
            log.warning("guest %d dropped: %s", slot, text)
            tell(sock, protocol.error(text))
            sock.shutdown(socket.SHUT_RDWR)

    def guest_of(self, pid: int) -> int | None:
        """The process that has handed its userfaultfds over: `pid` or a child of it."""
        return next((each for each in self._pids if pid in _ancestry(each)), None)

    async def admit(
        self,
        client: socket.socket,
        pid: int,
        uffds: list[int],
        ram: Geometry,
        addresses: list[int],
        mode: str,
    ) -> int:
        """The slot of a client that hands the userfaultfds of process `pid` over, which are closed
        here; it has been told.  AttachError."""
        async with self._admission:
            return await self._admit(client, pid, uffds, ram, addresses, mode)

    async def _admit(
        self,
        client: socket.socket,
        pid: int,
        uffds: list[int],
        ram: Geometry,
        addresses: list[int],
        mode: str,
    ) -> int:
        try:
            slot = self._take_slot(pid, uffds, ram.shards, self._memory.blocks, addresses)
            try:
                await self._add(slot, addresses, protocol.MODES[mode], uffds)
            except (ShardError, HostError, OSError) as error:
                await self._drop(slot, False)
                self._free.append(slot)
                raise AttachError(str(error)) from None
        finally:
            _close(uffds)
        self._enter(slot, client, pid)
        if slot in self._broken:
            self.broken(slot, self._broken.pop(slot))
        if self.last_word is not None:
            await self.forget(slot, release="desc" not in self.last_word)
        return slot

    def _take_slot(
        self,
        pid: int,
        uffds: list[int],
        shards: int,
        segments: Sequence[Segment],
        addresses: list[int],
    ) -> int:
        """AttachError unless this can be a guest."""
        if len(uffds) != shards:
            raise AttachError(
                f"{len(uffds)} userfaultfds handed over, expected one for each of {shards} shards"
            )
        _check_uffds(uffds)
        check_mapped(pid, segments, addresses)
        if not self._free:
            raise AttachError(f"{MAX_GUESTS} guests are attached already; close one first")
        slot = self._free.pop(0)
        self._broken.pop(slot, None)
        return slot

    def _enter(self, slot: int, client: socket.socket, pid: int) -> None:
        self._guests[slot] = client
        self._pids.add(pid)
        self._memory.control.note_guest(slot, pid)
        tell(client, {"attached": {"guest": slot}})

    def reserve(
        self,
        client: socket.socket,
        pid: int,
        uffds: list[int],
        backends: BackendSegments,
        addresses: list[int],
        mode: str,
    ) -> int:
        """As admit(), of a destination that comes before the block list: what the workers are told
        of it waits for admit_reserved().  AttachError."""
        shards, segments = backends.geometry.shards, backends.segments
        try:
            slot = self._take_slot(pid, uffds, shards, segments, addresses)
        except BaseException:
            _close(uffds)
            raise
        self._reserved[slot] = _Reserved(uffds, addresses, mode)
        self._enter(slot, client, pid)
        return slot

    async def admit_reserved(self, ram: Geometry) -> None:
        """The geometry is known, and the workers have it; AttachError."""
        async with self._admission:
            for slot, guest in list(self._reserved.items()):
                rest = [0] * (len(ram.blocks) - len(guest.addresses))
                mode = protocol.MODES[guest.mode]
                try:
                    await self._add(slot, guest.addresses + rest, mode, guest.uffds)
                except (ShardError, HostError, OSError) as error:
                    raise AttachError(str(error)) from None
                self._drop_reserved(slot)

    def _drop_reserved(self, slot: int) -> None:
        guest = self._reserved.pop(slot, None)
        if guest is not None:
            _close(guest.uffds)

    async def forget(self, slot: int, *, release: bool) -> None:
        """The workers forget it, and it is told how it ended, if it has."""
        client = self._guests.pop(slot, None)
        if client is None:
            return
        self._drop_reserved(slot)
        with contextlib.suppress(ShardError):
            await self._drop(slot, release)
        if self.last_word is not None:
            tell(client, self.last_word)
        self._free.append(slot)
        self._memory.control.note_guest(slot, 0)


def _close(fds_: list[int]) -> None:
    for fd in fds_:
        os.close(fd)


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


def tell(client: socket.socket, message: dict) -> None:
    """Small and rare, so the socket's buffer takes it; a client that is gone needs no answer."""
    with contextlib.suppress(OSError):
        fds.send(client, message)
