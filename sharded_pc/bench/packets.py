"""A recording's pages once more, as a source with multifd would have sent them: precopy alone.

Whatever the recording says of a page last is sent once, in the blocks' order, in packets of at most
128 pages, in turns on each channel.  A machine type of 8.1 or newer meets at MULTIFD_FLUSH and has
its zero pages in the packets, an older one at each section's end, with zero pages on the main
channel (wire/multifd.py).  Nothing follows the RAM: a destination takes that for a machine without
devices.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator
from pathlib import Path

from sharded_pc.bench import packing, recording
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.wire import machine as machines
from sharded_pc.wire import multifd, writer

FIRST_WITH_FLUSH = (8, 1)
REACHED = 2
"""The PING behind all pages: its PONG says that they are in place, on all channels."""


@dataclasses.dataclass(frozen=True, slots=True)
class Packets:
    """What each channel sends: `openings`, then, with the pages, from..to of the file."""

    path: str
    openings: tuple[bytes, ...]
    spans: tuple[tuple[int, int], ...]
    head: bytes
    """of the main channel, through the set-up"""
    meeting: bytes
    """of the main channel: where the pages are complete"""
    lasts: tuple[bytes, ...]
    """of each channel, with the end"""
    tail: bytes
    """of the main channel: the end"""
    normal: int
    zero: int
    """pages"""


def write(found: recording.Recording, path: Path, channels: int, method: str) -> Packets:
    """Makes the file.  With a compression each page keeps its first half and has zeros behind it:
    noise would show nothing.  OSError, HostError."""
    with recording.mapped(found.path) as data, path.open("wb") as file:
        return _Writer(data, file, channels, method).write(found.machine)


class _Writer:
    def __init__(self, data: mmap.mmap, file, channels: int, method: str) -> None:
        self._data, self._file = data, file
        self._method = method
        self._channels = range(channels)
        self._number = 0
        self._pages: dict[str, dict[int, int]] = {}

    def write(self, machine: str) -> Packets:
        scan = recording.Scan(self._data)
        scan.note = lambda header, at: self._note(scan.block, header & ~(PAGE_BYTES - 1), at)
        scan.run()
        version = machines.version(machine)
        flushes = version is None or version >= FIRST_WITH_FLUSH
        met = writer.multifd_flush() if flushes else b""
        setup = writer.ram_setup([RamBlock(name, size) for name, size in scan.blocks.items()])
        end = writer.eos() + writer.footer()
        head = writer.header() + writer.configuration(machine) + writer.open_return_path()
        syncs = self._syncs()
        openings = tuple(
            multifd.opening(channel) + sync
            for channel, sync in zip(self._channels, syncs, strict=True)
        )
        spans = self._write_channels(with_zeros=flushes)
        zeros = b"" if flushes else b"".join(self._zero_records())
        return Packets(
            self._file.name, openings, spans,
            head + setup.removesuffix(end) + met + end,
            writer.ram_section(zeros + met) + writer.ping(REACHED),
            ((b"",) * len(self._channels)) if flushes else self._syncs(),
            writer.ram_section(b"", last=True) + writer.eof() + writer.vmdescription({}),
            *self._counts(),
        )  # fmt: skip

    def _note(self, block: str, offset: int, at: int) -> None:
        self._pages.setdefault(block, {})[offset] = at

    def _counts(self) -> tuple[int, int]:
        each = [at >= 0 for pages in self._pages.values() for at in pages.values()]
        return sum(each), len(each) - sum(each)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _syncs(self) -> tuple[bytes, ...]:
        return tuple(multifd.header(self._next(), multifd.Flag.SYNC) for _ in self._channels)

    def _write_channels(self, *, with_zeros: bool) -> tuple[tuple[int, int], ...]:
        """Numbers go round over the channels; the file has one channel behind the other."""
        packets = list(self._packets(with_zeros=with_zeros))
        first = self._number
        self._number += len(packets)
        syncs, spans = self._syncs(), []
        for channel in self._channels:
            pack, began = packing.packer(self._method), self._file.tell()
            for index in range(channel, len(packets), len(self._channels)):
                self._file.write(self._packet(first + index, *packets[index], pack))
            self._file.write(syncs[channel])
            spans.append((began, self._file.tell()))
        return tuple(spans)

    def _packets(self, *, with_zeros: bool) -> Iterator[tuple[str, list[int]]]:
        """A block and offsets in it."""
        for block, pages in self._pages.items():
            chosen = [offset for offset, at in sorted(pages.items()) if with_zeros or at >= 0]
            for first in range(0, len(chosen), multifd.PACKET_PAGES):
                yield block, chosen[first : first + multifd.PACKET_PAGES]

    def _packet(self, number: int, block: str, offsets: list[int], pack: packing.Pack) -> bytes:
        pages = self._pages[block]
        normal = [offset for offset in offsets if pages[offset] >= 0]
        zero = [offset for offset in offsets if pages[offset] < 0]
        data = b"".join(self._bytes(pages[offset]) for offset in normal)
        payload = pack(data) if normal else b""
        flags = packing.FLAGS[self._method]  # QEMU wants it of a packet of zero pages, too
        return multifd.header(number, flags, block, normal, zero, len(payload)) + payload

    def _bytes(self, at: int) -> bytes:
        if self._method == "none":
            return self._data[at : at + PAGE_BYTES]
        return self._data[at : at + PAGE_BYTES // 2].ljust(PAGE_BYTES, b"\0")

    def _zero_records(self) -> Iterator[bytes]:
        for block, pages in self._pages.items():
            for offset, at in pages.items():
                if at < 0:
                    yield writer.zero_page(block, offset)
