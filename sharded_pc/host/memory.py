"""Room for a guest: /dev/shm, memory, the cgroup's limit, the process's limits.

Sources: tmpfs(5), proc(5) on MemAvailable, the kernel's admin-guide/cgroup-v2.rst on memory.max,
getrlimit(2).  All sizes are bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from sharded_pc.errors import HostError
from sharded_pc.host.finding import Finding, fact, optional, required
from sharded_pc.host.limits import Limits, Shm

SCANT_BYTES = 1 << 30
"""Less is worth a word: Docker's /dev/shm has 64 MiB unless told otherwise."""

LEAST_BYTES = 16 << 20
"""Less does not hold even the control segment and the tmp pages."""

MOUNT = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm"


def require_memory(needed: int, limits: Limits | None = None) -> None:
    """HostError when `needed` bytes of shared memory do not fit in /dev/shm or in memory, with
    both numbers and the remedy."""
    limits = limits or Limits.read()
    if limits.shm is None:
        raise HostError(str(shm_mount(limits)))
    for where, free, remedy in room(limits, needed):
        if needed > free:
            raise HostError(
                f"{needed} bytes ({human(needed)}) of shared memory needed,"
                f" {free} bytes ({human(free)}) available in {where}; {remedy}"
            )


def room(limits: Limits, needed: int) -> Iterator[tuple[str, int, str]]:
    """(where, bytes free, remedy to have `needed` bytes free) of each bound on shared memory."""
    if limits.shm is not None:
        yield from _shm_room(limits.shm, needed)
    yield from _memory_room(limits, needed)


def shm_mount(limits: Limits) -> Finding:
    detail, remedy = _shm_trouble(limits.shm)
    return required("/dev/shm", not remedy, detail, remedy)


def _shm_trouble(shm: Shm | None) -> tuple[str, str]:
    """Detail and remedy; no remedy, no trouble."""
    if shm is None:
        return "not there", f"mkdir -p /dev/shm && {MOUNT}"
    if shm.fstype != "tmpfs":
        return f"on {shm.fstype or 'no mount'}, not on a tmpfs", MOUNT
    if not shm.writable:
        remedy = "mount -o remount,rw /dev/shm && chmod 1777 /dev/shm"
        return f"not writable for uid {os.getuid()}", remedy
    return "a writable tmpfs", ""


def shm_space(limits: Limits) -> Finding:
    name, shm = "/dev/shm space", limits.shm
    room = list(_shm_room(shm, SCANT_BYTES)) if shm else []
    if not room:
        return fact(name, "no limit of its own" if shm else "none")
    _, free, remedy = room[0]
    return _space(name, free, f"{human(free)} free of {human(shm.size)}", remedy)


def available_memory(limits: Limits) -> Finding:
    room = list(_memory_room(limits, SCANT_BYTES))
    if not room:
        detail, remedy = "MemAvailable cannot be read", "mount -t proc proc /proc"
        return optional("memory", False, detail, remedy)
    detail = ", ".join(f"{human(free)} available in {where}" for where, free, _ in room)
    _, free, remedy = min(room, key=lambda each: each[1])
    return _space("memory", free, detail, remedy)


def _shm_room(shm: Shm, needed: int) -> Iterator[tuple[str, int, str]]:
    """As room(), of /dev/shm."""
    if shm.size is not None and shm.free is not None:
        mib = -(-(shm.size - shm.free + needed) >> 20)
        yield "/dev/shm", shm.free, f"mount -o remount,size={mib}M /dev/shm"


def _memory_room(limits: Limits, needed: int) -> Iterator[tuple[str, int, str]]:
    """As room(), of the machine and of the tightest cgroup."""
    if limits.mem_available is not None:
        remedy = "stop other programs or use a host with more memory"
        yield "the machine", limits.mem_available, remedy
    if limits.cgroup is not None:
        group = limits.cgroup
        remedy = _raise(group.used + needed, group.file)
        yield f"the cgroup of {group.file}", group.available, remedy


def _raise(limit: int, file: str) -> str:
    return f"echo {limit} > {file} (or what sets it: systemd's MemoryMax=, docker's --memory)"


def _space(name: str, free: int, detail: str, remedy: str) -> Finding:
    """Scant room is worth a word; next to none makes everything fail."""
    ok = free >= SCANT_BYTES
    return Finding(name, ok, free < LEAST_BYTES, detail, None if ok else remedy)


def process_limits(limits: Limits) -> Finding:
    bounds = {"ulimit -v": limits.address_space, "ulimit -f": limits.file_size}
    found = [f"{name} is {human(size)}" for name, size in bounds.items() if size is not None]
    detail = ", ".join(found) + ": no larger RAMBlock fits" if found else "none on memory and files"
    remedy = "ulimit -v unlimited && ulimit -f unlimited"
    return optional("process limits", not found, detail, remedy)


def huge_pages(limits: Limits) -> Finding:
    detail = f"shmem_enabled={limits.shmem_huge}, vm.nr_hugepages={limits.huge_pages}"
    return fact("huge pages", detail)


def human(size: float) -> str:
    """The size in the largest unit that leaves a whole part."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{round(size, 1):g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


JUDGES = (shm_mount, shm_space, available_memory, process_limits, huge_pages)
