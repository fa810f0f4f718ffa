"""Packets of multifd: a table of cases, and their two readers, `reference` (wire/multifd.py) and
`Core` (native/multifd/)."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import random
import socket
import threading
import zlib
from collections.abc import Iterator

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES, Geometry, Placement, RamBlock
from sharded_pc.native.control import Bitmap, Control, control_bytes
from sharded_pc.native.multifd import ChannelLoop, Meeting
from sharded_pc.wire import multifd as wire
from sharded_pc.wire.feed import Feed
from sharded_pc.wire.multifd import Flag

BLOCKS = (RamBlock("pc.ram", 300 * PAGE_BYTES), RamBlock("/rom@etc/acpi/tables", 2 * PAGE_BYTES))
ROM = BLOCKS[1].name
WAIT_S = 20.0


def data(page: int, version: int = 0) -> bytes:
    return random.Random(f"{page}/{version}").randbytes(PAGE_BYTES // 4) * 4


def pages(*numbers: int) -> list[int]:
    return [number * PAGE_BYTES for number in numbers]


def packet(number: int, *normal: int, zero=(), block="pc.ram", flags=0, version=0) -> bytes:
    """A good one, whole."""
    head = wire.header(number, flags, block, pages(*normal), pages(*zero))
    return head + b"".join(data(page, version) for page in normal)


def sync(number: int, room: int = 0) -> bytes:
    return wire.header(number, Flag.SYNC, room=room)


class Zlib:
    """What a source's channel does with multifd-compression=zlib."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(1)

    def packet(self, number: int, *normal: int, version=0) -> bytes:
        raw = b"".join(data(page, version) for page in normal)
        packed = self._deflate.compress(raw) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        head = wire.header(number, Flag.ZLIB, "pc.ram", pages(*normal), size=len(packed))
        return head + packed


@dataclasses.dataclass
class Seen:
    memory: dict[str, bytes]
    received: dict[str, list[int]]
    syncs: int
    error: str | None


def reference(stream: bytes, step: int) -> Seen:
    memory = {block.name: bytearray(block.size) for block in BLOCKS}
    received: dict[str, set[int]] = {block.name: set() for block in BLOCKS}
    feed = Feed(wire.Reader({block.name: block for block in BLOCKS}).packets())
    seen: list[wire.Packet] = []
    error = None
    try:
        for at in range(0, len(stream), step):
            seen += feed.feed(stream[at : at + step])
    except RemoteProtocolError as refused:
        error = refused.what
    for each in seen + feed._out:
        for n, offset in enumerate((*each.normal, *each.zero)):
            page = each.data[n * PAGE_BYTES :][:PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
            memory[each.block][offset : offset + PAGE_BYTES] = page
            received[each.block].add(offset // PAGE_BYTES)
    return Seen(
        {name: bytes(raw) for name, raw in memory.items()},
        {name: sorted(numbers) for name, numbers in received.items()},
        sum(each.sync for each in seen + feed._out),
        error,
    )


class Core:
    """The C loop of one channel on memory of its own."""

    def __init__(self, placement: Placement, stack: contextlib.ExitStack) -> None:
        geometry = Geometry.of(BLOCKS, 1, 64 * PAGE_BYTES)
        self.control = Control(stack.enter_context(mmap.mmap(-1, control_bytes(1))))
        stack.callback(self.control.release)
        self.control.init(1, os.getpid())
        self.control.publish(geometry, placement)
        size = self.control.n_bits // 8
        bits = stack.enter_context(mmap.mmap(-1, 2 * size))
        self.received, self.written = Bitmap(bits, 0, size), Bitmap(bits, size, size)
        stack.callback(self.received.release)
        stack.callback(self.written.release)
        self._written = self.written if placement is Placement.CONTINUE else None
        self.fds = []
        for block in BLOCKS:
            self.fds.append(os.memfd_create("multifd"))
            stack.callback(os.close, self.fds[-1])
            os.truncate(self.fds[-1], block.size)
        self.meeting = Meeting(self.control)

    @contextlib.contextmanager
    def channel(self, number: int) -> Iterator[socket.socket]:
        """The source's end; the loop has ended when this has."""
        ours, theirs = socket.socketpair()
        self.meeting.expect(number)
        loop = ChannelLoop(
            self.control, number, theirs.fileno(), self.received, self._written, self.fds
        )
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            with ours, theirs:
                try:
                    yield ours
                    ours.shutdown(socket.SHUT_WR)
                    thread.join(WAIT_S)
                finally:
                    loop.stop()
                    thread.join(WAIT_S)
        finally:
            assert not thread.is_alive()
            loop.release()

    def run(self, stream: bytes, step: int) -> Seen:
        self.meeting.release(1 << 40)  # no meeting holds it up
        with self.channel(0) as sock, contextlib.suppress(BrokenPipeError):
            for at in range(0, len(stream), step):
                sock.sendall(stream[at : at + step])
        error = self.meeting.why_ended(0)
        text = None if error is None else str(error).removeprefix("channel 0: ")
        syncs = self.control.raw.channels[0].syncs
        return Seen(self.memory(), self.pages(), syncs, text)

    def memory(self) -> dict[str, bytes]:
        return {
            block.name: os.pread(fd, block.size, 0)
            for block, fd in zip(BLOCKS, self.fds, strict=True)
        }

    def pages(self) -> dict[str, list[int]]:
        found = {}
        for index, block in enumerate(BLOCKS):
            first = self.control.block(index)[2]
            found[block.name] = [n for n in range(block.pages) if self.received.test(first + n)]
        return found


READERS = ("reference", Placement.COPY, Placement.CONTINUE)


def read(reader, stream: bytes, step: int = 1 << 30) -> Seen:
    if reader == "reference":
        return reference(stream, step)
    with contextlib.ExitStack() as stack:
        return Core(reader, stack).run(stream, step)


def _zlib_stream() -> bytes:
    source = Zlib()
    return source.packet(0, 1, 2, 3) + sync(1) + source.packet(2, 2, 200, version=1) + sync(3)


GOOD = {
    "nothing": b"",
    "syncs": sync(0) + sync(1, room=128),
    "an empty packet that is no SYNC (7.2)": wire.header(0),
    "a SYNC that brings pages (7.2)": packet(0, 3, 4, flags=Flag.SYNC) + wire.header(0),
    "neighbours and others": packet(0, 5, 6, 7, 9, 299, 0),
    "zeros (9.0)": packet(0, 1, zero=(2, 3)) + packet(1, zero=(299,)),
    "data, then zeros": packet(0, 1, 2, 3) + packet(1, 9, zero=(1, 2)),
    "zeros, then data": packet(0, zero=(1, 2)) + packet(1, 1),
    "newer data": packet(0, 1, 2) + packet(1, 2, version=1),
    "a whole packet": packet(0, *range(128)) + packet(1, *range(299, 171, -1)),
    "another block": packet(0, 1, block=ROM) + packet(1, zero=(0,), block=ROM),
    "a size left over": wire.header(0, zero=pages(1), block="pc.ram", size=77) + packet(1, 2),
    "zlib": _zlib_stream(),
}  # fmt: skip
RAM, FIRST = "pc.ram", pages(0)
BAD = {
    "magic": (b"\x11\x22\x33\x45" + packet(0, 1)[4:],
              "multifd: magic 0x11223345 where a packet begins, expected 0x11223344"),
    "version": (packet(0, 1)[:7] + b"\2" + packet(0, 1)[8:], "multifd: version 2, expected 1"),
    "device state": (wire.header(0, Flag.DEVICE_STATE), "multifd: device state on a channel (turn "
                     "the source's multifd device transfer off)"),
    "qpl": (wire.header(0, Flag.QPL, RAM, FIRST), "multifd: pages compressed by qpl (flags 0x8) "
            "cannot be unpacked here: set the source's multifd-compression to none"),
    "flags": (wire.header(0, 0x100, RAM, FIRST), "multifd: packet with unknown flags 0x100"),
    "room": (wire.header(0, 0, RAM, FIRST, room=129),
             "multifd: packet of 129 pages, expected at most 128"),
    "more than room": (wire.header(0, 0, RAM, pages(1, 2), pages(3), room=2),
                       "multifd: packet of 3 pages, expected at most 2"),
    "size": (wire.header(0, 0, RAM, FIRST, size=4095),
             "multifd: payload of 4095 bytes, expected 4096"),
    "packed size": (wire.header(0, Flag.ZLIB, RAM, FIRST, size=(1 << 20) + 1),
                    "multifd: payload of 1048577 bytes, expected at most 1048576"),
    "packed nothing": (wire.header(0, Flag.ZLIB, RAM, FIRST, size=0),
                       "multifd: payload of 0 bytes, expected at most 1048576"),
    "block": (wire.header(0, 0, "pc.rom", FIRST), "multifd: packet for unknown block 'pc.rom'"),
    "no block": (wire.header(0, 0, "", FIRST), "multifd: packet for unknown block ''"),
    "no end of the name": (wire.header(0, 0, "x" * 256, FIRST),
                           f"multifd: packet for unknown block {'x' * 255!r}"),
    "offset": (wire.header(0, 0, RAM, pages(300)),
               "multifd: offset 0x12c000 is no page of block 'pc.ram' of 0x12c000 bytes"),
    "zero's offset": (wire.header(0, 0, RAM, zero=[1 << 63]), "multifd: offset 0x8000000000000000 "
                      "is no page of block 'pc.ram' of 0x12c000 bytes"),
    "half a page": (wire.header(0, 0, RAM, zero=[0x800]),
                    "multifd: offset 0x800 is no page of block 'pc.ram' of 0x12c000 bytes"),
    "rubbish in zlib": (wire.header(0, Flag.ZLIB, RAM, FIRST, size=9) + b"123456789",
                        "multifd: 9 compressed bytes do not unpack to 4096 bytes of pages"),
}  # fmt: skip
