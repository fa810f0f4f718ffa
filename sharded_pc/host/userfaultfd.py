"""What the kernel's userfaultfd can do for us.

Sources: userfaultfd(2), ioctl_userfaultfd(2), the kernel's admin-guide/mm/userfaultfd.rst and
admin-guide/sysctl/vm.rst.  Features are probed, never derived from a version.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import mmap
import os

from sharded_pc.errors import HostError
from sharded_pc.host.finding import Finding, optional, required
from sharded_pc.host.limits import Limits
from sharded_pc.native.uffd import FEATURES, Info, Uffd

IOCTLS = {"COPY": 1 << 3, "ZEROPAGE": 1 << 4, "WAKE": 1 << 2}
"""Bits of uffdio_register.ioctls that placement needs."""

KERNEL_FAULTS = "kernel-mode faults"


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """What the kernel answered to opening a userfaultfd and registering a page of shared memory."""

    info: Info | None
    """None: it could not be opened"""
    ioctls: int = 0
    """uffdio_register.ioctls of the page"""
    errno: int = 0
    error: str = ""

    @classmethod
    def read(cls) -> Probe:
        """Never raises: what fails is the answer."""
        info = None
        try:
            with contextlib.closing(Uffd.open(features=0)) as uffd:
                info = uffd.info
                return cls(info, _register_a_page(uffd))
        except (HostError, OSError) as error:
            return cls(info, 0, getattr(error, "errno", 0) or 0, str(error))


def _register_a_page(uffd: Uffd) -> int:
    """The ioctls that the kernel allows on one untouched page of shared memory."""
    fd = os.memfd_create("sharded-pc-check", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE) as page:
            # A view left in a local would forbid the mapping to close.
            return uffd.register(ctypes.addressof(ctypes.c_char.from_buffer(page)), mmap.PAGESIZE)
    finally:
        os.close(fd)


def opened(limits: Limits, probe: Probe) -> Finding:
    ok = probe.info is not None
    detail = f"opened by {probe.info.how.value}" if ok else probe.error
    return required("userfaultfd", ok, detail, _opening(probe.errno, limits))


def _opening(err: int, limits: Limits) -> str:
    if err == errno.ENOSYS:
        return "boot a kernel with CONFIG_USERFAULTFD=y"
    # From Linux 5.11 on a user-mode-only one needs no permission: then a filter forbids the call.
    container = "in a container also docker run --device /dev/userfaultfd"
    return f"{_permission(limits, device=True)}; {container}"


def kernel_faults(limits: Limits, probe: Probe) -> Finding:
    """A guest under KVM faults in kernel mode, and so does a system call that reads guest RAM."""
    info = probe.info
    if info is None:
        return _unknown(KERNEL_FAULTS)
    if info.kernel_faults:
        return optional(KERNEL_FAULTS, True, "served, KVM guests and system calls too", "")
    detail = (
        "not served: user-mode-only is enough for plain processes, not for KVM guests or system"
        f" calls on guest RAM (/dev/userfaultfd: {os.strerror(info.device_errno)};"
        f" userfaultfd(2): {os.strerror(info.syscall_errno)})"
    )
    remedy = _permission(limits, device=info.device_errno != errno.ENOENT)
    return optional(KERNEL_FAULTS, False, detail, remedy)


def _permission(limits: Limits, device: bool) -> str:
    """The ways to be given a userfaultfd that serves the kernel's faults too."""
    ways = ["run with CAP_SYS_PTRACE"]
    if device:
        acl = f"setfacl -m u:{os.getuid()}:rw /dev/userfaultfd"
        ways.insert(0, f"{acl} (or chmod o+rw /dev/userfaultfd)")
    if limits.unprivileged_uffd == 0:
        ways.insert(0, "sysctl vm.unprivileged_userfaultfd=1")
    return " or ".join(ways)


def missing_shmem(limits: Limits, probe: Probe) -> Finding:
    return _feature("MISSING_SHMEM", probe, "to catch missing pages of shared memory", "4.11")


def minor_shmem(limits: Limits, probe: Probe) -> Finding:
    finding = _feature("MINOR_SHMEM", probe, "for --placement continue", "5.14")
    return dataclasses.replace(finding, required=False)


def thread_id(limits: Limits, probe: Probe) -> Finding:
    finding = _feature("THREAD_ID", probe, "to tell which vCPU waits", "4.14")
    return dataclasses.replace(finding, required=False)


def _feature(name: str, probe: Probe, use: str, since: str) -> Finding:
    if probe.info is None:
        return dataclasses.replace(_unknown(name), required=True)
    ok = bool(probe.info.features & FEATURES[name])
    detail = f"{'present' if ok else f'not in features {probe.info.features:#x}'}, {use}"
    return required(name, ok, detail, f"boot Linux {since} or newer")


def range_ioctls(limits: Limits, probe: Probe) -> Finding:
    name = "/".join(IOCTLS)
    if probe.info is None:
        return dataclasses.replace(_unknown(name), required=True)
    missing = [each for each, bit in IOCTLS.items() if not probe.ioctls & bit]
    detail = f"{', '.join(missing)} missing on shared memory" if missing else "on shared memory"
    reason = f": {probe.error}" if probe.error else ""
    return required(name, not missing, detail + reason, "boot Linux 4.11 or newer, CONFIG_SHMEM=y")


def _unknown(name: str) -> Finding:
    return optional(name, False, "not known without a userfaultfd", "mend userfaultfd first")


JUDGES = (opened, kernel_faults, missing_shmem, minor_shmem, thread_id, range_ioctls)
