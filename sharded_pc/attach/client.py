"""`sharded_pc.attach`: a Python process as the guest."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
from collections.abc import Mapping
from types import MappingProxyType

from sharded_pc import shm
from sharded_pc.attach import protocol
from sharded_pc.errors import AttachError
from sharded_pc.geometry import Geometry
from sharded_pc.memory import GuestMemory
from sharded_pc.native.core import ffi
from sharded_pc.native.uffd import FEATURES, MODE_MINOR, Uffd
from sharded_pc.shm import Segment
from sharded_pc.transport import fds
from sharded_pc.transport.peers import peer_of


class Guest:
    """A guest's RAM, mapped into this process.

    `blocks` maps block names to writable memoryviews of bytes.  Touching a page that has not
    arrived blocks the thread that does it until the page is here; Python holds the GIL meanwhile,
    so other Python threads of this process wait too.  A process that is forked before wait() has
    returned does not have this memory (an access there ends it): it attaches by itself.  Use it as
    a context manager, or close().
    """

    def __init__(self, ram: Geometry, segments: list[Segment], sock: socket.socket | None) -> None:
        self.geometry = ram
        self._segments = segments
        self._sock = sock
        self._inbox = fds.Inbox()
        self._uffds: list[Uffd] = []
        self._views: dict[str, memoryview] = {}
        self.number: int | None = None
        """The receiver's number for this guest."""
        self.completed = sock is None
        for block, segment in zip(ram.blocks, segments, strict=True):
            self._views[block.name] = memoryview(segment.map)

    @property
    def blocks(self) -> Mapping[str, memoryview]:
        return MappingProxyType(self._views)

    def addresses(self) -> dict[str, int]:
        """Where each block is mapped in this process."""
        return {name: _address(view) for name, view in self._views.items()}

    def register(self, mode: int) -> list[int]:
        """Opens one userfaultfd for each shard and registers its stripes; returns descriptors."""
        addresses = self.addresses()
        features = FEATURES["MISSING_SHMEM"] | (FEATURES["MINOR_SHMEM"] if mode & MODE_MINOR else 0)
        self._uffds = [Uffd.open(features) for _ in range(self.geometry.shards)]
        for extent in self.geometry.extents():
            uffd = self._uffds[extent.shard]
            uffd.register(addresses[extent.block] + extent.offset, extent.size, mode)
        self._advise(mmap.MADV_DONTFORK)  # a child has no userfaultfd: it would read zeros
        if not mode & MODE_MINOR:  # until Linux 6.4 khugepaged fills holes that wait for a page
            self._advise(mmap.MADV_NOHUGEPAGE)
        return [uffd.fd for uffd in self._uffds]

    def _advise(self, advice: int) -> None:
        """EINVAL: not something this kernel knows, or not for so small a mapping."""
        for segment in self._segments:
            with contextlib.suppress(OSError):
                segment.map.madvise(advice)

    def wait(self, timeout: float | None = None) -> None:
        """Returns when every page has arrived and the receiver needs this guest no more.
        TimeoutError; AttachError if the receiver failed or went away before."""
        while not self.completed:
            self.completed = self._next_event(timeout) == protocol.COMPLETED

    def wait_ready(self, timeout: float | None = None) -> None:
        """Returns when memory may be touched."""
        word = self._next_event(timeout)
        self.completed = word == protocol.COMPLETED

    def _next_event(self, timeout: float | None) -> str:
        assert self._sock is not None
        self._sock.settimeout(timeout)
        message = fds.receive_message(self._sock, self._inbox)
        if message is None:
            raise AttachError("the receiver is gone; accesses to missing pages wait")
        if not isinstance(message, dict) or message.get("event") not in _EVENTS:
            raise AttachError(f"the receiver refused: {_reason(message)}")
        if message["event"] == protocol.FAILED:
            raise AttachError(f"the migration failed: {message.get('desc')}")
        if message["event"] == protocol.COMPLETED:
            self._advise(mmap.MADV_DOFORK)
            self._advise(mmap.MADV_HUGEPAGE)
        if message.get("huge-pages"):
            # The memory stands on huge pages, but was mapped page by page as it came.
            self._advise(MADV_COLLAPSE)
        return message["event"]

    def close(self) -> None:
        """Unmaps the RAM.  BufferError while views of it (slices, arrays) are still in use."""
        for view in self._views.values():
            view.release()
        for segment in self._segments:
            segment.close()
        # The memory is unmapped: nobody can wait on these any more.
        for uffd in self._uffds:
            uffd.close()
        self._inbox.close()
        if self._sock is not None:
            self._sock.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


MADV_COLLAPSE = 25
"""Linux 6.1; the mmap module does not name it"""

_EVENTS = (protocol.READY, protocol.COMPLETED, protocol.FAILED)


def _reason(message: object) -> object:
    if isinstance(message, dict) and isinstance(message.get("error"), dict):
        return message["error"].get("desc")
    return message


def _address(view: memoryview) -> int:
    buffer = ffi.from_buffer(view)
    try:
        return int(ffi.cast("uintptr_t", buffer))
    finally:
        ffi.release(buffer)


def attach(
    target: str | os.PathLike, *, timeout: float | None = None, wait_ready: bool = True
) -> Guest:
    """Maps the RAM that a receiver is receiving, or has received.

    `target` is the path of a receiver's attach socket, or the name of a receiver that has exited
    with --keep.  Returns when the memory may be touched (with `wait_ready` false: as soon as it is
    mapped).  `timeout` is in seconds for each step; TimeoutError.  AttachError says why a receiver
    refused; FileNotFoundError if there is none.
    """
    target = os.fspath(target)
    if "/" not in target:
        return _attach_kept(target)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        _connect(sock, target)
        return _hand_over(sock, timeout, wait_ready)
    except ConnectionError as error:
        sock.close()
        raise AttachError("the receiver went away in the middle of the hand-over") from error
    except BaseException:
        sock.close()
        raise


def _connect(sock: socket.socket, path: str) -> None:
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):  # refused: its receiver is dead
        raise FileNotFoundError(errno.ENOENT, "no receiver listens there", path) from None
    receiver = peer_of(sock)
    if not receiver.is_trusted:  # it would be given userfaultfds, and could write into us
        raise AttachError(
            f"who listens at {path} (process {receiver.pid}) belongs to uid {receiver.uid}: see "
            f"who made that socket"
        )


def _hand_over(sock: socket.socket, timeout: float | None, wait_ready: bool) -> Guest:
    inbox = fds.Inbox()
    with contextlib.ExitStack() as undo:
        undo.callback(inbox.close)
        fds.send(sock, protocol.attach())
        answer = fds.receive_message(sock, inbox)
        if answer is None:
            raise AttachError("the receiver closed the attach socket")
        offer = protocol.check_geometry(answer)
        segments = [Segment.from_fd(fd) for fd in inbox.take_fds()]
        for segment in segments:
            undo.callback(segment.close)
        _check_segments(offer.ram, segments)
        guest = Guest(offer.ram, segments, sock)
        guest._inbox = inbox
        undo.pop_all()
    try:
        rights = [] if offer.mode is None else guest.register(protocol.MODES[offer.mode])
        fds.send(sock, protocol.mappings(guest.addresses()), rights)
        _confirm(guest, timeout)
        if wait_ready:
            guest.wait_ready(timeout)
    except BaseException:
        with contextlib.suppress(BufferError):
            guest.close()
        raise
    return guest


def _confirm(guest: Guest, timeout: float | None) -> None:
    guest._sock.settimeout(timeout)
    message = fds.receive_message(guest._sock, guest._inbox)
    if not isinstance(message, dict) or "attached" not in message:
        raise AttachError(f"the receiver refused: {_reason(message)}")
    guest.number = message["attached"]["guest"]


def _check_segments(ram: Geometry, segments: list[Segment]) -> None:
    sizes = [segment.size for segment in segments]
    expected = [block.size for block in ram.blocks]
    if sizes != expected:
        raise AttachError(f"the receiver handed over memory of {sizes} bytes, not {expected}")


def _attach_kept(name: str) -> Guest:
    """RAM that a receiver left with --keep: plain shared memory, nothing to register."""
    control = Segment.open(f"/{shm.check_name(name)}{shm.CONTROL}")
    try:
        kept = GuestMemory.geometry_of(control)
    finally:
        control.close()
    if kept is None:
        raise AttachError(f"receiver {name!r} is still receiving: attach to its socket")
    segments = [Segment.open(shm.block_segment_name(name, block.name)) for block in kept.blocks]
    return Guest(kept, segments, None)
