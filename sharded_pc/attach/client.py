"""`sharded_pc.attach`: a Python process as the guest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from types import MappingProxyType

from sharded_pc import shm
from sharded_pc.attach.guest import Handle
from sharded_pc.errors import AttachError
from sharded_pc.geometry import Geometry
from sharded_pc.memory import GuestMemory
from sharded_pc.native.core import ffi
from sharded_pc.shm import Segment


class Guest:
    """A guest's RAM, mapped into this process.

    `blocks` maps block names to writable memoryviews of bytes.  Touching a page that has not
    arrived blocks the thread that does it until the page is here; Python holds the GIL meanwhile,
    so other Python threads of this process wait too.  If the receiver dies they wait for one that
    takes its place on the same memory and the same socket: a thread of C attaches to that, and says
    on stderr what happens.  A process that is forked before wait() has returned does not have this
    memory (an access there ends it): it attaches by itself.

    Use it as a context manager, or close(); what is not closed lives as long as the process.
    """

    def __init__(self, ram: Geometry, segments: list[Segment], handle: Handle | None) -> None:
        self.geometry = ram
        self._segments = segments
        self._handle = handle
        self._views: dict[str, memoryview] = {}
        for block, segment in zip(ram.blocks, segments, strict=True):
            self._views[block.name] = memoryview(segment.map)

    @property
    def blocks(self) -> Mapping[str, memoryview]:
        return MappingProxyType(self._views)

    @property
    def number(self) -> int | None:
        """The receiver's number for this guest; None for RAM that was attached by name."""
        return None if self._handle is None else self._handle.number

    @property
    def completed(self) -> bool:
        """Every page has arrived."""
        return self._handle is None or self._handle.completed

    def addresses(self) -> dict[str, int]:
        """Where each block is mapped in this process."""
        return {name: _address(view) for name, view in self._views.items()}

    def wait(self, timeout: float | None = None) -> None:
        """Returns when every page has arrived and no receiver needs this guest any more.

        While no receiver is there it waits, as accesses do, for one that takes the memory over:
        without `timeout` (seconds) for ever, if none comes.  TimeoutError.  AttachError, once, if
        the receiver says that the migration failed, or goes away before memory may be touched;
        called again it waits for a successor.
        """
        self._wait("completed", timeout)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Returns when memory may be touched; TimeoutError and AttachError as wait()."""
        self._wait("ready", timeout)

    def _wait(self, what: str, timeout: float | None) -> None:
        if self._handle is not None:
            self._handle.wait(what, timeout)

    def close(self) -> None:
        """Unmaps the RAM.  BufferError while views of it (slices, arrays) are still in use: then
        pages go on to arrive."""
        for view in self._views.values():
            view.release()
        if self._handle is None:
            self._unmap()
            return
        self._handle.stop()
        try:
            self._unmap()
        except BufferError:
            self._handle.go_on()
            raise
        # The memory is unmapped: nobody can wait on the userfaultfds any more.
        self._handle.close()
        _attached.discard(self)

    def _unmap(self) -> None:
        for segment in self._segments:
            segment.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_attached: set[Guest] = set()
"""Not closed yet.  If one were collected while views of its memory are in use, who waits there
would read zeros."""


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
    handle = Handle(target)
    try:
        guest = _map(handle, timeout)
    except BaseException:
        handle.stop()
        handle.close()
        raise
    try:
        _hand_over(guest, handle, timeout)
        if wait_ready:
            guest.wait_ready(timeout)
    except BaseException:
        with contextlib.suppress(BufferError):
            guest.close()
        raise
    return guest


def _map(handle: Handle, timeout: float | None) -> Guest:
    """The receiver's offer, mapped."""
    handle.open(timeout)
    offer, fds = handle.offer(timeout)
    with contextlib.ExitStack() as undo:
        segments = []
        for fd in fds:
            segments.append(Segment.from_fd(os.dup(fd)))
            undo.callback(segments[-1].close)
        _check_segments(offer.ram, segments)
        guest = Guest(offer.ram, segments, handle)
        undo.pop_all()
    return guest


def _hand_over(guest: Guest, handle: Handle, timeout: float | None) -> None:
    _attached.add(guest)
    at = guest.addresses()
    segments = zip(at.items(), guest._segments, strict=True)
    handle.join([(name, segment.fd, address) for (name, address), segment in segments], timeout)


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
