"""Shared-memory segments of a receiver: names, life and death.

A receiver called NAME owns POSIX shared-memory objects; under /dev/shm they are

==================  ==========================================================
NAME.BLOCK          one RAMBlock (unusual bytes of its name as %XX)
NAME%control        state, geometry, rings, counters (native/shared/control.h)
NAME%pool           tmp pages, 1 MiB for each shard
NAME%bitmaps        received, requested and written bits
==================  ==========================================================

The owner holds a lock (flock) on the control segment while it lives, which is how `clean` tells a
dead receiver's leftovers from a live one's: a lock cannot outlive its process, a pid can be reused.
Who looks at it takes the lock for a moment, and who removes it holds it meanwhile; so whoever has
got the lock must look whether the name still means what was locked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc

from sharded_pc.errors import HostError, UsageError
from sharded_pc.native.core import why_unmapped

ROOT = Path("/dev/shm")
"""Where Linux shows POSIX shared memory."""

NAME_MAX = 255
"""Bytes of a file's name."""

LOCK_SECONDS = 2.0
"""The patience of a new owner, and of who removes, with those who look at the segment."""
LOCK_AGAIN_SECONDS = 0.001

CONTROL, POOL, BITMAPS = "%control", "%pool", "%bitmaps"

_LAST = {POOL: 1, CONTROL: 2}
"""In what order a removal ends."""
SEMAPHORES = "sem"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KEPT = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._@+-")


def is_name(name: str) -> bool:
    """A receiver may be called so.  Not `sem`: /dev/shm/sem.NAME are other programs' semaphores."""
    return _NAME.fullmatch(name) is not None and name != SEMAPHORES


def check_name(name: str) -> str:
    """`name` if a receiver may be called so; UsageError."""
    if name == SEMAPHORES:
        raise UsageError(
            f"receiver name {name!r}: {ROOT}/{name}.* are POSIX semaphores; choose another --name"
        )
    if not is_name(name):
        raise UsageError(
            f"receiver name {name!r}: use 1 to 64 letters, digits, '_' or '-', as in --name guest0"
        )
    return name


def block_segment_name(receiver: str, block: str) -> str:
    """POSIX name of a block's segment: '/guest0.pc.ram', '/guest0.%2From@etc%2Facpi%2Ftables'; a
    name too long for a file is a digest, '/guest0.~1f3a...'."""
    raw = block.encode("utf-8", "surrogateescape")
    plain = "".join(chr(b) if b in _KEPT else f"%{b:02X}" for b in raw)
    if len(receiver) + len(plain) >= NAME_MAX:
        plain = "~" + hashlib.sha256(raw).hexdigest()
    return f"/{receiver}.{plain}"


class Segment:
    """One shared-memory object: a descriptor and, once asked for, one shared mapping."""

    def __init__(self, name: str, fd: int, size: int) -> None:
        self.name = name
        self.fd = fd
        self.size = size
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls, name: str, size: int, *, reserve: bool = False) -> Segment:
        """A new one of `size` bytes, all holes; `reserve` allocates them now, so that no later
        access can meet a full file system.  HostError if the name is taken or memory is short."""
        try:
            made = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
        except posix_ipc.ExistentialError:
            raise HostError(
                f"shared memory {name} exists already; choose another --name, or remove a dead "
                f"receiver's with `sharded-pc clean`"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: above the limit of file sizes
            why = getattr(error, "strerror", None) or error
            raise HostError(f"create shared memory {name} of {size} bytes: {why}") from error
        segment = cls(name, made.fd, size)
        if reserve:
            segment._reserve()
        return segment

    @classmethod
    def create_owned(cls, name: str, size: int) -> Segment:
        """A new one, reserved, with the owner's lock.  HostError, also if somebody sits on it."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            segment = cls.create(name, size, reserve=True)
            try:
                segment.own(deadline)
                if segment.is_named():
                    return segment
            except HostError:
                if segment.is_named():
                    segment.unlink()
                segment.close()
                raise
            segment.close()  # `clean` came before the lock, and took it for a dead one's

    def own(self, deadline: float) -> None:
        """Takes the owner's lock, past those who only look; HostError."""
        while not self.lock():
            if time.monotonic() > deadline:
                raise HostError(
                    f"lock shared memory {self.name}: another process has held its lock for "
                    f"{LOCK_SECONDS:g} s (see /proc/locks); choose another --name"
                )
            time.sleep(LOCK_AGAIN_SECONDS)

    def is_named(self) -> bool:
        """Its name has neither been removed nor made anew."""
        try:
            return os.path.samestat(os.stat(ROOT / self.name.lstrip("/")), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self.fd, 0, self.size)
        except OSError as error:
            self.unlink()
            self.close()
            raise HostError(
                f"reserve {self.size} bytes for {self.name}: {error.strerror}; "
                f"enlarge it with `mount -o remount,size=... {ROOT}`"
            ) from error

    @classmethod
    def open(cls, name: str, *, read_only: bool = False) -> Segment:
        """An existing one; FileNotFoundError."""
        try:
            found = posix_ipc.SharedMemory(name, read_only=read_only)
        except posix_ipc.ExistentialError:
            raise FileNotFoundError(errno.ENOENT, "no such shared memory", name) from None
        except posix_ipc.PermissionsError:
            raise PermissionError(errno.EACCES, "another user's shared memory", name) from None
        return cls(name, found.fd, found.size)

    @classmethod
    def from_fd(cls, fd: int) -> Segment:
        """One whose descriptor was handed over; it becomes the Segment's."""
        return cls("", fd, os.fstat(fd).st_size)

    @property
    def map(self) -> mmap.mmap:
        """The whole segment, shared and writable.  HostError."""
        if self._map is None:
            try:
                self._map = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED)
            except OSError as error:
                why = why_unmapped(error.errno or 0)
                raise HostError(f"map {self.size:#x} bytes of shared memory: {why}") from error
        return self._map

    @property
    def view(self) -> mmap.mmap:
        """The whole segment, shared and read-only; the caller closes it."""
        return mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ)

    def lock(self, *, shared: bool = False) -> bool:
        """Takes the owner's lock (`shared`: among others who look); false if somebody has it."""
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Unmaps and closes.  BufferError if somebody still looks at the mapping."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def unlink(self) -> None:
        """Removes the name; memory goes when the last mapping does."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(self.name)


def missing_bytes(name: str) -> int:
    """How much of a segment's size is not allocated; 0 if it is gone."""
    try:
        found = (ROOT / name.lstrip("/")).stat()
    except FileNotFoundError:
        return 0
    return max(found.st_size - found.st_blocks * 512, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Leftover:
    """What stands in shared memory under one receiver's name."""

    name: str
    files: tuple[str, ...]
    size: int
    """allocated bytes"""
    alive: bool
    """its owner lives"""

    @property
    def kept(self) -> bool:
        """Left on purpose by --keep, which takes the tmp pages away."""
        has_ram = any(file.startswith(f"{self.name}.") for file in self.files)
        return not self.alive and has_ram and f"{self.name}{POOL}" not in self.files

    @property
    def state(self) -> str:
        """'alive', 'kept' or 'dead'."""
        return "alive" if self.alive else "kept" if self.kept else "dead"


def receivers() -> Iterator[Leftover]:
    """Every receiver that shared memory knows of, by its control segment."""
    for control in sorted(ROOT.glob(f"*{CONTROL}")):
        name = control.name.removesuffix(CONTROL)
        if is_name(name):
            try:
                with _looked_at(name) as found:
                    pass
            except (FileNotFoundError, PermissionError):
                continue  # it ended while we looked, or is another user's
            yield found


def _files(name: str) -> list[Path]:
    own = {f"{name}{suffix}" for suffix in (CONTROL, POOL, BITMAPS)}
    return sorted(p for p in ROOT.iterdir() if p.name in own or p.name.startswith(f"{name}."))


@contextlib.contextmanager
def _looked_at(name: str, *, shared: bool = True) -> Iterator[Leftover]:
    """What stands there; nobody removes it until the block ends, unless it is alive.
    FileNotFoundError."""
    control = Segment.open(f"/{name}{CONTROL}")
    try:
        alive = not (control.lock(shared=True) if shared else _is_alone(control))
        if not control.is_named():
            raise FileNotFoundError(errno.ENOENT, "removed meanwhile", control.name)
        files = _files(name)
        size = sum(p.stat().st_blocks * 512 for p in files)
        yield Leftover(name, tuple(p.name for p in files), size, alive)
    finally:
        control.close()


def _is_alone(control: Segment) -> bool:
    """Takes the owner's lock; false if it has an owner.  Others who look are let finish."""
    deadline = time.monotonic() + LOCK_SECONDS
    while not control.lock():
        if not control.lock(shared=True) or time.monotonic() > deadline:
            return False
        control.unlock()  # or two who remove would wait for each other
        time.sleep(LOCK_AGAIN_SECONDS)
    return True


def remove(leftover: Leftover, also: Callable[[], None] = lambda: None) -> bool:
    """Removes a dead receiver's files, and what `also` does; the control segment goes last, and the
    tmp pages before it, so that an interrupted removal is found again and does not look kept.
    Does nothing, and says so, if a receiver has got the name since, or has left its RAM there by
    --keep."""
    try:
        with _looked_at(leftover.name, shared=False) as now:
            if now.alive or (now.kept and not leftover.kept):
                return False
            also()
            for file in sorted(now.files, key=lambda f: _LAST.get(f[len(now.name) :], 0)):
                Segment(f"/{file}", -1, 0).unlink()
            return True
    except FileNotFoundError:
        return False
