"""The C core's door: the extension itself, and return codes turned into errors."""

from __future__ import annotations

import os
from errno import ENOMEM, ENOSPC

from sharded_pc.errors import HostError
from sharded_pc.native import _native

ffi = _native.ffi
lib = _native.lib


def ensure(rc: int, doing: str) -> int:
    """`rc` if it is not negative; else HostError for -errno: "doing: reason"."""
    if rc < 0:
        raise system_error(-rc, doing)
    return rc


def ensure_object(pointer, doing: str):
    """`pointer` unless NULL: out of memory."""
    if pointer == ffi.NULL:
        raise MemoryError(doing)
    return pointer


def why(errno: int) -> str:
    """The kernel's reason, with the remedy where it is that memory ran out."""
    if errno in (ENOMEM, ENOSPC):
        return f"{os.strerror(errno)}: make room in /dev/shm or in memory (`df /dev/shm`, `free`)"
    return os.strerror(errno)


MORE_MAPS = "raise vm.max_map_count (`sysctl`), or make room in memory (`free`)"


def why_unmapped(errno: int) -> str:
    """The kernel's reason for not mapping or registering, with the remedy."""
    return f"{os.strerror(errno)}: {MORE_MAPS}" if errno == ENOMEM else os.strerror(errno)


def system_error(errno: int, doing: str) -> HostError:
    error = HostError(f"{doing}: {why(errno)}")
    error.errno = errno  # type: ignore[attr-defined]
    return error


def now_ns() -> int:
    """CLOCK_MONOTONIC, as the core's counters use it."""
    return lib.sp_now_ns()
