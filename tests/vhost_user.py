"""A vhost-user front-end without a guest: what a back-end has to do stands in RAM that is missing.

``Overlaid``  an oracle whose source has, in some pages, what a test puts there
``Queue``     a split virtqueue and its requests, as bytes of such pages
``FrontEnd``  QEMU's end of a back-end's socket (QEMU docs/interop/vhost-user.rst)

Nobody here touches the RAM: the back-end reads rings, requests and data as they arrive.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.testing.oracle import DIRTIED, PageOracle
from sharded_pc.wire import writer
from tests.preload_kit import WAIT_S
from tests.qemu import wait_until

QUEUE_SIZE = 256
NEXT, WRITE = 1, 2
"""VRING_DESC_F_*"""
VERSION_1, PROTOCOL = 1 << 32, 1 << 30
"""VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES"""
MQ, REPLY_ACK, MEM_SLOTS = 1 << 0, 1 << 3, 1 << 15
"""VHOST_USER_PROTOCOL_F_*"""
GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_NUM, SET_ADDR, SET_BASE, SET_KICK, SET_CALL = 8, 9, 10, 12, 13
GET_PROTOCOL, SET_PROTOCOL, SET_ENABLE, GET_SLOTS, ADD_REGION = 15, 16, 18, 36, 37
USER = 0x7000_0000_0000
"""The front-end's own address of RAM, of which only differences matter."""
HIGH = 4 << 30
"""Where a PC's RAM goes on behind its hole."""


@dataclasses.dataclass(frozen=True)
class Overlaid(PageOracle):
    """Pages of the first block that are zeros in precopy, and `overlay` when the source stops."""

    overlay: tuple[tuple[int, bytes], ...] = ()

    @functools.cache  # noqa: B019
    def precopied(self, block: int) -> bytes:
        return self._with(super().precopied(block), block, 0)

    @functools.cache  # noqa: B019
    def final(self, block: int) -> bytes:
        return self._with(super().final(block), block, DIRTIED)

    def _with(self, versions: bytes, block: int, version: int) -> bytes:
        out = bytearray(versions)
        for page, _ in self.overlay if block == 0 else ():
            out[page] = version
        return bytes(out)

    def page(self, block: int, page: int, version: int) -> bytes:
        put = dict(self.overlay) if block == 0 and version == DIRTIED else {}
        return put[page] if page in put else super().page(block, page, version)

    def records(
        self, block: int, pages: Sequence[int], versions: bytes, *, go_on: bool = False
    ) -> bytes:
        put = dict(self.overlay) if block == 0 else {}
        out, name = b"", self.blocks[block].name
        for page in pages:
            if page in put and versions[page] == DIRTIED:
                out += writer.page(None if go_on else name, page * PAGE_BYTES, put[page])
            else:
                out += super().records(block, [page], versions, go_on=go_on)
            go_on = True
        return out


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of the RAM's file, as the guest sees it; bytes."""

    guest: int
    size: int
    offset: int

    def packed(self) -> bytes:
        return struct.pack("=QQQQ", self.guest, self.size, USER + self.guest, self.offset)


def halves(size: int) -> tuple[Region, Region]:
    """Below and above 4 GiB."""
    return Region(0, size // 2, 0), Region(HIGH, size // 2, size // 2)


class Queue:
    """A queue and requests in pages [at, at + 4) of the RAM; data stands where requests say."""

    def __init__(self, at: int, regions: Sequence[Region]) -> None:
        self._at, self._regions = at, regions
        self._desc: list[bytes] = []
        self._heads: list[int] = []
        self._small = bytearray()

    def address(self, offset: int) -> int:
        """The guest's of a byte of the file."""
        region = next(r for r in self._regions if r.offset <= offset < r.offset + r.size)
        return region.guest + offset - region.offset

    def small(self, data: bytes) -> int:
        """Puts a header, or room for an answer, into the queue's own page; its offset in the
        file."""
        self._small += b"\0" * (-len(self._small) % 8)
        at = (self._at + 3) * PAGE_BYTES + len(self._small)
        self._small += data
        return at

    def request(self, *parts: tuple[int, int, bool]) -> int:
        """Parts are (offset in the file, bytes, the device writes it); the request's number."""
        self._heads.append(len(self._desc))
        for number, (offset, size, write) in enumerate(parts):
            last = number == len(parts) - 1
            flags = (WRITE if write else 0) | (0 if last else NEXT)
            link = 0 if last else len(self._desc) + 1
            self._desc.append(struct.pack("=QIHH", self.address(offset), size, flags, link))
        assert len(self._desc) <= QUEUE_SIZE
        return len(self._heads) - 1

    def overlay(self) -> tuple[tuple[int, bytes], ...]:
        avail = struct.pack(f"=HH{len(self._heads)}H", 0, len(self._heads), *self._heads)
        contents = [b"".join(self._desc), avail, b"", bytes(self._small)]
        pages = [content.ljust(PAGE_BYTES, b"\0") for content in contents]
        assert all(len(page) == PAGE_BYTES for page in pages)
        return tuple((self._at + n, page) for n, page in enumerate(pages))

    def addresses(self) -> tuple[int, int, int]:
        """The guest's of descriptors, of what is used, of what is offered."""
        at = self._at * PAGE_BYTES
        return tuple(self.address(at + n * PAGE_BYTES) for n in (0, 2, 1))

    def wait_used(self, ram: Path, count: int) -> None:
        """Until so many requests are answered."""

        def used() -> bool:
            with ram.open("rb") as file:
                file.seek((self._at + 2) * PAGE_BYTES + 2)
                return struct.unpack("=H", file.read(2))[0] == count

        wait_until(used, f"{count} requests", WAIT_S)


class FrontEnd:
    """Speaks to the back-end that listens at `path`; a context manager."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(WAIT_S)
        self._sock.connect(str(path))
        self._kicks: list[int] = []
        self._acks = 0

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
        for fd in self._kicks:
            os.close(fd)

    def set_up(self, more: int = 0) -> None:
        """Features, of which `more` are the device's own; answers are asked for from now on."""
        features = self._get(GET_FEATURES)
        assert features & PROTOCOL and features & VERSION_1
        protocol = self._get(GET_PROTOCOL) & (MQ | REPLY_ACK | MEM_SLOTS)
        assert protocol & REPLY_ACK
        self._say(SET_PROTOCOL, struct.pack("=Q", protocol))
        self._acks = REPLY_ACK
        self.has_slots = bool(protocol & MEM_SLOTS)
        self._say(SET_OWNER)
        self._say(SET_FEATURES, struct.pack("=Q", PROTOCOL | VERSION_1 | more))

    def share(self, fd: int, regions: Sequence[Region], *, slots: bool = False) -> None:
        """SET_MEM_TABLE, or with `slots` an ADD_MEM_REG for each; RefusedError."""
        if not slots:
            head = struct.pack("=II", len(regions), 0)
            table = head + b"".join(region.packed() for region in regions)
            self._say(SET_MEM_TABLE, table, [fd] * len(regions))
            return
        for region in regions:
            self._say(ADD_REGION, struct.pack("=Q", 0) + region.packed(), [fd])

    def start(self, number: int, queue: Queue) -> None:
        """The queue runs, and is kicked."""
        desc, used, avail = (USER + address for address in queue.addresses())
        kick, call = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        self._kicks += [kick, call]
        self._say(SET_NUM, struct.pack("=II", number, QUEUE_SIZE))
        self._say(SET_BASE, struct.pack("=II", number, 0))
        self._say(SET_ADDR, struct.pack("=IIQQQQ", number, 0, desc, used, avail, 0))
        self._say(SET_CALL, struct.pack("=Q", number), [call])
        self._say(SET_KICK, struct.pack("=Q", number), [kick])
        self._say(SET_ENABLE, struct.pack("=II", number, 1))
        os.eventfd_write(kick, 1)

    def _say(self, request: int, body: bytes = b"", files: Sequence[int] = ()) -> None:
        flags = 1 | (8 if self._acks else 0)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
        self._sock.sendmsg([struct.pack("=III", request, flags, len(body)) + body], rights)
        if self._acks and (error := self._hear(request)):
            raise RefusedError(f"request {request} was answered by {error}")

    def _get(self, request: int) -> int:
        self._sock.sendall(struct.pack("=III", request, 1, 0))
        return self._hear(request)

    def _hear(self, request: int) -> int:
        head = self._read(12)
        answered, _, size = struct.unpack("=III", head)
        assert answered == request and size == 8, (request, head)
        return struct.unpack("=Q", self._read(8))[0]

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self._sock.recv(size - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                raise RefusedError("the back-end closed the connection")
            data += more
        return data


class RefusedError(Exception):
    """The back-end says no, or goes away."""
