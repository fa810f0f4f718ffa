"""A source that answers page requests and pushes nothing: demand paging by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable

from sharded_pc.bench.fault_image import FLAG, START
from sharded_pc.bench.fault_state import RAM_BLOCK, State
from sharded_pc.errors import GuestLost
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.native.page_service import PageService
from sharded_pc.native.ram import NotYet, Stop
from sharded_pc.native.records import block_records
from sharded_pc.wire import return_path, writer
from sharded_pc.wire.feed import Feed
from sharded_pc.wire.return_path import Shut

QUIET_MS = 200
"""After so long without a request we look whether the receiver lives."""
STUCK_SECONDS = 30.0
CHUNK_PAGES = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """Of one guest that has touched all its pages."""

    requests: int
    answered: int


class Source:
    """One migration of a saved guest over `sock`, a connected socket that stays the caller's."""

    def __init__(self, sock: socket.socket, state: State, size: int) -> None:
        self._sock, self._state, self._size = sock, state, size
        self._sock.settimeout(STUCK_SECONDS)

    def serve(self, check: Callable[[], object]) -> Served:
        """Lets the guest run, answers its requests for all of [START, START + size), sends the
        rest and returns when the receiver has everything.

        `check` is called when the guest is quiet, and may raise.  GuestLost, WireClosed.
        """
        self._send_precopy()
        self._switch()
        self._send(writer.ram_section(b"")[:-_SECTION_END])
        with contextlib.closing(Stop()) as stop:
            service = self._answer(stop, check)
        self._send(writer.eos() + writer.footer())
        self._finish(service.unread)
        return Served(service.requests, service.answered)

    def _send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise GuestLost(f"the receiver takes nothing any more: {error}") from error

    def _send_precopy(self) -> None:
        """All but what lies from START on, and the flag is up."""
        self._send(self._state.setup)
        for name, content in self._state.memory.items():
            end = START if name == RAM_BLOCK else len(content)
            self._send_pages(name, 0, end)
        low = bytearray(self._state.memory[RAM_BLOCK][FLAG : FLAG + PAGE_BYTES])
        low[:4] = b"\1\0\0\0"
        self._send(writer.ram_section(writer.page(RAM_BLOCK, FLAG, bytes(low))))

    def _send_pages(self, name: str, start: int, end: int) -> None:
        content, step = self._state.memory[name], CHUNK_PAGES * PAGE_BYTES
        for at in range(start, end, step):
            records = block_records(
                name, at // PAGE_BYTES, bytes(content[at : min(at + step, end)])
            )
            self._send(writer.ram_section(records))

    def _switch(self) -> None:
        ram = len(self._state.memory[RAM_BLOCK])
        self._send(writer.discard(RAM_BLOCK, [(START, ram - START)]))
        self._send(self._state.package)

    def _answer(self, stop: Stop, check: Callable[[], object]) -> PageService:
        """Within an open section."""
        fd, pages = self._sock.fileno(), self._size // PAGE_BYTES
        service = PageService(fd, stop, RAM_BLOCK, START // PAGE_BYTES, pages)
        seen, moved = 0, time.monotonic()
        while True:
            try:
                service.run(QUIET_MS)
                return service
            except NotYet:
                check()
            if service.answered != seen:
                seen, moved = service.answered, time.monotonic()
            elif time.monotonic() > moved + STUCK_SECONDS:
                raise GuestLost(f"no request for {STUCK_SECONDS:.0f} s, {seen} of {pages} pages")

    def _finish(self, unread: bytes) -> None:
        """What was not touched, the end, and the receiver's word that it has it."""
        self._send_pages(RAM_BLOCK, START + self._size, len(self._state.memory[RAM_BLOCK]))
        self._send(writer.ram_section(b"", last=True) + writer.eof())
        feed = Feed(return_path.messages())
        shut = _shut_of(feed.feed(unread))
        while shut is None:
            try:
                data = self._sock.recv(1 << 16)
            except OSError as error:
                raise GuestLost(f"the receiver does not end the return path: {error}") from error
            if not data:
                raise GuestLost("the receiver ended the return path without SHUT")
            shut = _shut_of(feed.feed(data))
        if shut.value:
            raise GuestLost(f"the receiver failed: SHUT {shut.value}")


_SECTION_END = len(writer.eos() + writer.footer())


def _shut_of(messages: list) -> Shut | None:
    return next((message for message in messages if isinstance(message, Shut)), None)
