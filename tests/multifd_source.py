"""A source with channels of multifd for tests that need no QEMU."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.testing.oracle import DIRTIED
from sharded_pc.wire import multifd as wire
from sharded_pc.wire import writer
from tests.receiver import Receiver
from tests.synthetic import StepSource, connect

PACKET_PAGES = 100


class ChannelSource(StepSource):
    """``flushes``: meets at MULTIFD_FLUSH and sends zeros in packets (QEMU 9.0 and later), else at
    each section's end, zeros on the main channel (7.2).  ``numbers`` are the channels'."""

    def __init__(
        self,
        uri: str,
        stack: contextlib.ExitStack,
        *,
        flushes: bool,
        numbers: Sequence[int] = (0, 1),
    ) -> None:
        super().__init__(stack.enter_context(connect(uri)))
        self._uri, self._stack = uri, stack
        self.flushes = flushes
        self.number = 0
        self.channels = [self.open_channel(number) for number in numbers]

    def open_channel(self, number: int) -> socket.socket:
        sock = self._stack.enter_context(connect(self._uri))
        sock.sendall(wire.opening(number))
        return sock

    def sync(self) -> bytes:
        """All channels; what the main channel says of it."""
        for sock in self.channels:
            sock.sendall(wire.header(self._next(), wire.Flag.SYNC, room=0))
        return writer.multifd_flush() if self.flushes else b""

    def _next(self) -> int:
        self.number += 1
        return self.number - 1

    def set_up(self) -> None:
        head = writer.header() + writer.configuration("synthetic") + writer.open_return_path()
        setup = writer.ram_setup(self.oracle.blocks)
        end = writer.eos() + writer.footer()
        met = setup.removesuffix(end) + self.sync() + end
        self._send(head + writer.ping(1) + writer.postcopy_advise() + met)

    def precopy(self) -> None:
        """Two rounds: everything as data that is too new, then as it was."""
        for block, ram in enumerate(self.oracle.blocks):
            self.round(block, bytes([DIRTIED]) * ram.pages)
        for block in range(len(self.oracle.blocks)):
            self.round(block, self.oracle.precopied(block))

    def switch(self) -> None:
        """With a last meeting in front of it (10.1)."""
        if self.flushes:
            self._send(writer.ram_section(self.sync()))
        super().switch()

    def round(self, block: int, versions: bytes) -> None:
        """All pages of a block, the higher ones first."""
        zeros = b""
        for first in reversed(range(0, len(versions), PACKET_PAGES)):
            here = range(first, min(first + PACKET_PAGES, len(versions)))
            normal = [page for page in here if versions[page]]
            none = [page for page in here if not versions[page]]
            self.packet(block, normal, none if self.flushes else [], versions)
            if not self.flushes:
                name = self.oracle.blocks[block].name
                zeros += b"".join(writer.zero_page(name, page * PAGE_BYTES) for page in none)
        self._send(writer.ram_section(zeros + self.sync()))

    def packet(self, block: int, normal: list[int], zero: list[int], versions: bytes) -> None:
        data = b"".join(self.oracle.page(block, page, versions[page]) for page in normal)
        offsets = ([page * PAGE_BYTES for page in pages] for pages in (normal, zero))
        number, name = self._next(), self.oracle.blocks[block].name
        sock = self.channels[number % len(self.channels)]
        sock.sendall(wire.header(number, 0, name, *offsets) + data)


@contextlib.contextmanager
def source_of(receiver: Receiver, **options) -> Iterator[ChannelSource]:
    with contextlib.ExitStack() as stack:
        yield ChannelSource(receiver.uri(), stack, **options)
