"""The guests as the stream's thread knows them: it serves their requested pages (guests.h)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sharded_pc.native.control import Control
from sharded_pc.native.core import ensure, ensure_object, ffi, lib


class Guests:
    """A table of attached guests.  A guest is added before the workers learn of it, and dropped
    after they have forgotten it."""

    def __init__(self, control: Control) -> None:
        self._keep = control
        raw = ensure_object(lib.sp_guests_new(control.raw), "allocate a table of guests")
        self.raw = ffi.gc(raw, lib.sp_guests_free)
        self._uffds: dict[int, list[int]] = {}

    def use_block(self, index: int, fd: int) -> None:
        """The segment that holds a block."""
        self.raw.fd[index] = fd

    def add(self, slot: int, uffds: Sequence[int], addresses: Sequence[int]) -> list[int]:
        """Returns this table's copies of `uffds`, one for each shard; `addresses`: one for
        each block, 0: not mapped."""
        own: list[int] = []
        try:
            own += (os.dup(fd) for fd in uffds)
            ensure(lib.sp_guests_add(self.raw, slot, own, list(addresses)), f"add guest {slot}")
        except BaseException:
            for fd in own:
                os.close(fd)
            raise
        self._uffds[slot] = own
        return own

    def drop(self, slot: int) -> None:
        """Does nothing if there is no such guest."""
        own = self._uffds.pop(slot, None)
        if own is not None:
            lib.sp_guests_drop(self.raw, slot)
            for fd in own:
                os.close(fd)

    def close(self) -> None:
        for slot in list(self._uffds):
            self.drop(slot)
