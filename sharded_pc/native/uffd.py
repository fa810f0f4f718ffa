"""One userfaultfd (uffd.h)."""

from __future__ import annotations

import dataclasses
import enum
import os

from sharded_pc.native.core import ensure, ffi, lib, system_error

MODE_MISSING = 1 << 0
MODE_MINOR = 1 << 2

FEATURES = {
    "MISSING_SHMEM": 1 << 5,
    "THREAD_ID": 1 << 8,
    "MINOR_SHMEM": 1 << 10,
}
"""UFFD_FEATURE_* bits that this project looks at."""


class How(enum.Enum):
    """The way a userfaultfd was opened."""

    DEVICE = "/dev/userfaultfd"
    SYSCALL = "userfaultfd(2)"
    USER_ONLY = "userfaultfd(2) with UFFD_USER_MODE_ONLY"


class Fill(enum.IntEnum):
    """Outcome of a fill ioctl; PART and PRESENT are no errors."""

    DONE = 0
    PART = 1
    PRESENT = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Info:
    """What the kernel offers: bits of linux/userfaultfd.h; errnos say why a way was not taken."""

    how: How
    features: int
    ioctls: int
    device_errno: int
    syscall_errno: int

    @property
    def kernel_faults(self) -> bool:
        """Faults in kernel mode (KVM, system calls) are served too."""
        return self.how is not How.USER_ONLY


class Uffd:
    """A userfaultfd of this process, closed with it or by close()."""

    def __init__(self, fd: int, info: Info | None = None) -> None:
        self.fd = fd
        self.info = info

    @classmethod
    def open(cls, features: int = FEATURES["MISSING_SHMEM"], *, user_only: bool = True) -> Uffd:
        """A new one after the handshake; HostError when the kernel says no."""
        raw = ffi.new("sp_uffd_info *")
        fd = ensure(lib.sp_uffd_open(features, user_only, raw), "open a userfaultfd")
        how = {1: How.DEVICE, 2: How.SYSCALL, 3: How.USER_ONLY}[raw.how]
        info = Info(how, raw.features, raw.ioctls, raw.device_errno, raw.syscall_errno)
        return cls(fd, info)

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def register(self, address: int, size: int, mode: int = MODE_MISSING) -> int:
        """Registers [address, address + size); returns the ioctls allowed there as bits."""
        ioctls = ffi.new("uint64_t *")
        rc = lib.sp_uffd_register(self.fd, address, size, mode, ioctls)
        ensure(rc, f"register {size:#x} bytes with a userfaultfd")
        return ioctls[0]

    def unregister(self, address: int, size: int) -> None:
        ensure(lib.sp_uffd_unregister(self.fd, address, size), "unregister from a userfaultfd")

    def wake(self, address: int, size: int) -> None:
        ensure(lib.sp_uffd_wake(self.fd, address, size), "wake a userfaultfd's waiters")

    def copy(self, to: int, source: int, size: int) -> tuple[Fill, int]:
        """UFFDIO_COPY without wake: outcome and bytes done."""
        return self._fill(lib.sp_uffd_copy, "UFFDIO_COPY", to, source, size, 0)

    def zeropage(self, address: int, size: int) -> tuple[Fill, int]:
        return self._fill(lib.sp_uffd_zeropage, "UFFDIO_ZEROPAGE", address, size, 0)

    def continue_(self, address: int, size: int) -> tuple[Fill, int]:
        return self._fill(lib.sp_uffd_continue, "UFFDIO_CONTINUE", address, size)

    def _fill(self, call, name: str, *args: int) -> tuple[Fill, int]:
        result = ffi.new("sp_fill_result *")
        outcome = call(self.fd, *args, result)
        if outcome == lib.SP_FILL_FAILED:
            raise system_error(result.err, name)
        return Fill(outcome), result.done
