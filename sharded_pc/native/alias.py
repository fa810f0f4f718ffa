"""The coordinator's mapping of a RAMBlock that no userfaultfd knows (alias.h)."""

from __future__ import annotations

import os

from sharded_pc.native.control import Bitmap, Control
from sharded_pc.native.core import ensure, ffi, lib, system_error


class Alias:
    """One segment of `size` bytes, mapped shared and writable at a 2 MiB boundary."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self.raw = lib.sp_alias_map(fd, size)
        if self.raw == ffi.NULL:
            raise system_error(ffi.errno, f"map {size:#x} bytes of shared memory")

    def populate(
        self, control: Control, received: Bitmap, block: int, shard: int, stop
    ) -> tuple[int, str | None]:
        """Allocates and maps the shard's stripes until done or the word `stop` is set, on the
        calling thread, whose priority it lowers: pages, and why it ended early (memory)."""
        pages = ffi.new("uint64_t *", 0)
        rc = lib.sp_alias_populate(control.raw, received.raw, block, shard, self.raw, stop, pages)
        return pages[0], os.strerror(-rc) if rc < 0 else None

    def close(self) -> None:
        """Unmaps; nobody may use it any more."""
        ensure(lib.sp_alias_unmap(self.raw, self.size), "unmap an alias")
