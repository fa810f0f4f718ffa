"""One shard's worker in C: placement loop, fault loops, guests (worker.h)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sharded_pc.errors import AttachError, HostError, ShardError
from sharded_pc.native.control import Bitmap, Control
from sharded_pc.native.core import ensure, ensure_object, ffi, lib, why, why_unmapped
from sharded_pc.native.uffd import Uffd


def allow_interrupts(signo: int) -> None:
    """Makes `signo` interrupt a blocking read of this process instead of ending it."""
    ensure(lib.sp_allow_interrupts(signo), f"handle signal {signo}")


class Shard:
    """Places the pages of one shard.  Buffers must outlive it; release() before closing them."""

    def __init__(
        self,
        control: Control,
        index: int,
        received: Bitmap,
        requested: Bitmap,
        written: Bitmap,
        pool,
        uffd: Uffd | None,
    ) -> None:
        """`uffd`: this process's own, None with `continue`, which needs no mapping here."""
        self.index = index
        self._keep = (control, received, requested, written, uffd)
        self._views: list = []
        pool_view = self._view(pool)
        fd = -1 if uffd is None else uffd.fd
        raw = lib.sp_worker_new(
            control.raw, index, pool_view, received.raw, requested.raw, written.raw, fd
        )
        self.raw = ffi.gc(ensure_object(raw, "allocate a worker"), lib.sp_worker_free)

    def _view(self, buffer):
        view = ffi.from_buffer(buffer, require_writable=True)
        self._views.append(view)
        return ffi.cast("uint8_t *", view)

    def release(self) -> None:
        ffi.release(self.raw)
        for view in self._views:
            ffi.release(view)

    def add_block(self, index: int, mapping, fd: int) -> None:
        """Makes a block known and registers this process's mapping of it, None with `continue`."""
        view = ffi.NULL if mapping is None else self._view(mapping)
        rc = lib.sp_worker_add_block(self.raw, index, view, fd)
        if rc < 0:
            why = why_unmapped(-rc)
            raise HostError(f"register block {index} with the worker's userfaultfd: {why}")

    def address(self, index: int) -> int:
        """Where this process mapped a block."""
        return int(ffi.cast("uintptr_t", self.raw.base[index]))

    def place_loop(self) -> None:
        """Runs until stop(); ShardError when a page cannot be placed."""
        if lib.sp_worker_place(self.raw) == lib.SP_SYS:
            raise self._failure(self.raw.err)

    def _failure(self, errno: int) -> ShardError:
        return ShardError(
            f"shard {self.index} could not place page {self.raw.err_bit}: {why(errno)}"
        )

    def listen(self, back_fd: int = -1) -> None:
        """All discards are done: what is here may be made visible.  Pages are requested on the
        socket `back_fd`, which must outlive this; -1: through the ring alone."""
        lib.sp_worker_listen(self.raw, back_fd)

    def stop(self) -> None:
        lib.sp_worker_stop(self.raw)

    def fault_loop(self, guest: int) -> None:
        """Runs until the guest is stopped; AttachError when its userfaultfd makes no sense."""
        errno, address = ffi.new("int *"), ffi.new("uint64_t *")
        if lib.sp_worker_faults(self.raw, guest, errno, address) == lib.SP_SYS:
            raise AttachError(
                f"shard {self.index}: fault of guest {guest} at address {address[0]:#x}: "
                f"{os.strerror(errno[0])}"
            )

    def add_guest(self, guest: int, uffd: int, addresses: Sequence[int], mode: int) -> None:
        """Makes a guest known: `addresses` is where it mapped each block (0: not mapped).
        AttachError if the userfaultfd cannot be registered there."""
        bad = ffi.new("uint32_t *")
        rc = lib.sp_worker_add_guest(self.raw, guest, uffd, list(addresses), mode, bad)
        if rc < 0:
            raise AttachError(
                f"block {bad[0]} at address {addresses[bad[0]]:#x} cannot be registered with the "
                f"guest's userfaultfd of shard {self.index}: {why_unmapped(-rc)}"
            )

    def stop_guest(self, guest: int) -> None:
        """Asks the fault loop to end; a signal must interrupt its read."""
        lib.sp_worker_stop_guest(self.raw, guest)

    def drop_guest(self, guest: int, *, release: bool) -> None:
        """Forgets a guest whose fault loop has ended; `release` unregisters its memory first."""
        lib.sp_worker_drop_guest(self.raw, guest, release)

    def wake_all(self) -> None:
        lib.sp_worker_wake_all(self.raw)

    def place(self, block: int, page: int, pages: int, source) -> None:
        """Places pages at once, atomically (for callers without a placement loop)."""
        view = ffi.from_buffer(source)
        rc = lib.sp_place_pages(self.raw, block, page, pages, ffi.cast("uint8_t *", view))
        self._check(rc)

    def place_zero(self, block: int, page: int, pages: int) -> None:
        self._check(lib.sp_place_zero(self.raw, block, page, pages))

    def discard(self, block: int, page: int, pages: int) -> None:
        self._check(lib.sp_discard_pages(self.raw, block, page, pages))

    def _check(self, rc: int) -> None:
        if rc < 0:
            raise self._failure(-rc)
