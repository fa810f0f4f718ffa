"""This process's own way to fill pages with `copy` placement."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

from sharded_pc.native.core import ffi
from sharded_pc.native.uffd import Uffd


class OwnMapping:
    """A mapping of every block, registered MISSING: UFFDIO_COPY fills pages through it.  Nobody
    looks at it."""

    def __init__(self, segments: Iterable[tuple[int, int]]) -> None:
        """(descriptor, bytes) of each block, in order; HostError."""
        self._maps: list[mmap.mmap] = []
        self.views: list = []
        self.uffd = Uffd.open()
        try:
            for fd, size in segments:
                self._map(fd, size)
        except BaseException:
            self.close()
            raise

    def _map(self, fd: int, size: int) -> None:
        made = mmap.mmap(fd, size)
        self._maps.append(made)
        view = ffi.from_buffer("uint8_t[]", made, require_writable=True)
        self.views.append(view)
        self.uffd.register(int(ffi.cast("uintptr_t", view)), size)

    def close(self) -> None:
        for view in self.views:
            ffi.release(view)
        for made in self._maps:
            made.close()
        self.uffd.close()
