"""The guest's end of the attach protocol (handle.h).

It is C, so that it goes on while Python's threads wait for a page and one of them holds the GIL.
The preload library runs the same.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable

from sharded_pc.attach import protocol
from sharded_pc.errors import AttachError, HostError
from sharded_pc.native.core import ensure, ensure_object, ffi, lib

STEP_SECONDS = 10.0
"""For what a receiver does at once, where the caller gives no time."""
LOOK_MS = 1000
"""A signal that comes just before a wait begins is seen so late."""


class Handle:
    """Who is attached by the receiver at `path`, or by its successors there.

    open(), offer(), join(): the hand-over.  From then on a thread hears the receiver, and hands the
    same userfaultfds over again when it goes away.  stop() and close() end that, in this order.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        raw = lib.sp_handle_new(os.fsencode(os.path.abspath(path)))
        # A wait in another thread may outlast close().
        self._raw = ffi.gc(ensure_object(raw, "allocate a guest"), lib.sp_handle_free)
        self._closed = False
        self._told = 0

    def open(self, timeout: float | None) -> None:
        """Asks for the RAM.  FileNotFoundError if nobody listens; AttachError, TimeoutError."""
        self._do(lib.sp_handle_open, _deadline(timeout))

    def offer(self, timeout: float | None) -> tuple[protocol.Offer, list[int]]:
        """The RAM, and descriptors of its blocks, good until join().  AttachError, TimeoutError."""
        self.wait("offered", timeout)
        size, count = ffi.new("size_t *"), ffi.new("unsigned *")
        text = ffi.buffer(lib.sp_handle_geometry(self._raw, size), size[0])
        rights = lib.sp_handle_rights(self._raw, count)
        try:
            message = json.loads(bytes(text))
        except ValueError as error:
            raise AttachError(f"the receiver's geometry cannot be read: {error}") from None
        return protocol.check_geometry(message), ffi.unpack(rights, count[0])

    def join(self, blocks: Iterable[tuple[str, int, int]], timeout: float | None) -> None:
        """Registers blocks, as (name, descriptor, address), and hands the userfaultfds over.
        HostError; AttachError and TimeoutError, also if the receiver does not take them."""
        for name, fd, address in blocks:
            base = ffi.cast("uint8_t *", address)
            ensure(lib.sp_handle_add(self._raw, repr(name).encode(), fd, base), f"map {name!r}")
        self._do(lib.sp_handle_join, _deadline(timeout))
        self.wait("attached", timeout)

    def wait(self, what: str, timeout: float | None) -> None:
        """Until `what` is true of sp_heard; returns without the GIL meanwhile.  TimeoutError;
        AttachError once for each receiver that said it failed, or went away too early."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not getattr(heard := self._look(), what):
            self._check(heard)
            left = LOOK_MS if deadline is None else (deadline - time.monotonic()) * 1000
            if left <= 0:
                raise TimeoutError(f"not {what} in {timeout:g} s")
            lib.sp_handle_await(self._raw, heard.news, min(int(left) + 1, LOOK_MS))

    @property
    def completed(self) -> bool:
        return bool(self._look().completed)

    @property
    def number(self) -> int:
        """The receiver's for this guest; -1 if it needs none."""
        return self._look().number

    def stop(self) -> None:
        """From now on the memory is left alone, and may be unmapped."""
        lib.sp_handle_stop(self._raw)

    def go_on(self) -> None:
        """After stop(), the memory being mapped still.  HostError."""
        self._do(lib.sp_handle_go_on)

    def close(self) -> None:
        """After stop(), the memory being unmapped; who waits in another thread gets AttachError."""
        if not self._closed:
            self._closed = True
            lib.sp_handle_close(self._raw)

    def _look(self):
        heard = ffi.new("sp_heard *")
        lib.sp_handle_look(self._raw, heard)
        return heard

    def _check(self, heard) -> None:
        if self._closed:
            raise AttachError("this guest is closed")
        why = ffi.string(heard.why)
        if heard.ended or (why and heard.failures != self._told):
            self._told = heard.failures
            raise AttachError(_text(why))

    def _do(self, call, *args: object) -> None:
        trouble = ffi.new("sp_trouble *")
        if call(self._raw, *args, trouble) == 0:
            return
        if trouble.cause == lib.SP_CAUSE_NOBODY:
            raise FileNotFoundError(errno.ENOENT, "no receiver listens there", self.path)
        kind = {lib.SP_CAUSE_HOST: HostError, lib.SP_CAUSE_LATE: TimeoutError}
        raise kind.get(trouble.cause, AttachError)(_text(ffi.string(trouble.text)))


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")


def _deadline(timeout: float | None) -> int:
    """A value of the core's clock."""
    seconds = STEP_SECONDS if timeout is None else timeout
    return time.monotonic_ns() + int(seconds * 1e9)
