"""What this machine allows, read once from its files: numbers, no judgement.

Sources: proc(5), cgroups(7), tmpfs(5) and the kernel's Documentation/admin-guide.  All sizes are
bytes.  What cannot be read is None, never a guess.
"""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")

UNLIMITED = 1 << 60
"""A cgroup v1 without a limit answers LONG_MAX rounded down to a page."""


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo, as far as we look at it."""

    root: str
    """the part of the file system that is mounted"""
    point: str
    fstype: str
    options: tuple[str, ...]
    """of the super block; a cgroup v1 names its controllers here"""


class Files(NamedTuple):
    """Names of one cgroup version's memory files."""

    limit: str
    usage: str
    reclaimable: str
    """key in memory.stat: page cache that goes first when the limit is met"""


V1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Files("memory.max", "memory.current", "inactive_file")


@dataclasses.dataclass(frozen=True, slots=True)
class Cgroup:
    """The memory limit of a cgroup that this process is in."""

    file: str
    """where the limit stands"""
    limit: int
    used: int
    """without page cache that the kernel drops first"""

    @property
    def available(self) -> int:
        return max(self.limit - self.used, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Shm:
    """The file system at /dev/shm."""

    fstype: str | None
    writable: bool
    size: int | None
    """None: a tmpfs mounted without a limit of its own"""
    free: int | None

    @classmethod
    def read(cls, root: Path = ROOT) -> Shm | None:
        """None when there is no /dev/shm."""
        path = root / "dev/shm"
        try:
            stat = os.statvfs(path)
        except OSError:
            return None
        size = stat.f_blocks * stat.f_frsize or None
        free = stat.f_bavail * stat.f_frsize if size else None
        return cls(_fstype(root, path), os.access(path, os.W_OK | os.X_OK), size, free)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Everything at one moment; `dataclasses.replace` makes the host a test wants."""

    kernel: str
    """release, as `uname -r`"""
    page_bytes: int
    unprivileged_uffd: int | None
    """vm.unprivileged_userfaultfd; None before Linux 5.2"""
    shm: Shm | None
    mem_available: int | None
    cgroup: Cgroup | None
    """the tightest one of this process; None: no limit"""
    address_space: int | None
    """RLIMIT_AS; None: no limit"""
    file_size: int | None
    """RLIMIT_FSIZE, which also bounds a shared memory segment; None: no limit"""
    max_map_count: int | None
    shmem_huge: str | None
    """the choice in transparent_hugepage/shmem_enabled"""
    huge_pages: int | None
    """vm.nr_hugepages"""
    cpus: int
    """that this process may run on"""

    @classmethod
    def read(cls, root: Path = ROOT) -> Limits:
        """Those of this process, with /proc, /sys and /dev looked up below `root`."""
        vm = root / "proc/sys/vm"
        groups = sorted(cgroups(root), key=lambda group: group.available)
        return cls(
            kernel=_text(root / "proc/sys/kernel/osrelease") or "",
            page_bytes=os.sysconf("SC_PAGE_SIZE"),
            unprivileged_uffd=_number(vm / "unprivileged_userfaultfd"),
            shm=Shm.read(root),
            mem_available=_mem_available(root),
            cgroup=groups[0] if groups else None,
            address_space=_rlimit(resource.RLIMIT_AS),
            file_size=_rlimit(resource.RLIMIT_FSIZE),
            max_map_count=_number(vm / "max_map_count"),
            shmem_huge=_chosen(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            huge_pages=_number(vm / "nr_hugepages"),
            cpus=len(os.sched_getaffinity(0)),
        )


def cgroups(root: Path = ROOT) -> Iterator[Cgroup]:
    """Every cgroup with a memory limit from this process's own up to the mounted top: the limit of
    each binds."""
    own = dict(_memberships(root))
    for mount in _mounts(root):
        files = _memory_files(mount)
        path = own.get("memory" if files is V1 else "")
        if files is None or path is None:
            continue
        top = root / mount.point.lstrip("/")
        folder = top / _below(mount.root, path)
        for each in (folder, *folder.parents):
            yield from _limited(each, files)
            if each == top:
                break


def _memory_files(mount: Mount) -> Files | None:
    if mount.fstype == "cgroup2":
        return V2
    return V1 if mount.fstype == "cgroup" and "memory" in mount.options else None


def _below(mounted: str, path: str) -> str:
    """`path` relative to the part of the hierarchy that is mounted; in a container that part may
    be another one than ours, then the mount point itself is all we can see."""
    relative = os.path.relpath(path, mounted)
    return "" if relative.startswith("..") else relative


def _limited(folder: Path, files: Files) -> Iterator[Cgroup]:
    limit, usage = _number(folder / files.limit), _number(folder / files.usage)
    if limit is None or usage is None or limit >= UNLIMITED:
        return
    stat = _table(folder / "memory.stat", " ")
    used = usage - int(stat.get(files.reclaimable, "0"))
    yield Cgroup(str(folder / files.limit), limit, max(used, 0))


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """(controller, path) of /proc/self/cgroup; version 2 has no controller's name."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _mounts(root: Path) -> list[Mount]:
    return [_mount(line) for line in _lines(root / "proc/self/mountinfo") if " - " in line]


def _mount(line: str) -> Mount:
    mount, _, system = line.partition(" - ")
    fields, (fstype, _, options) = mount.split(" "), system.rsplit(" ", 2)
    return Mount(fields[3], fields[4], fstype, tuple(options.split(",")))


def _fstype(root: Path, path: Path) -> str | None:
    """Type of the file system that `path` is on: of the last mount with the longest prefix."""
    real = "/" + os.path.relpath(os.path.realpath(path), os.path.realpath(root))
    best = Mount("", "", "", ())
    for mount in _mounts(root):
        covers = mount.point == "/" or f"{real}/".startswith(f"{mount.point}/")
        if covers and len(mount.point) >= len(best.point):
            best = mount
    return best.fstype or None


def _mem_available(root: Path) -> int | None:
    value = _table(root / "proc/meminfo", ":").get("MemAvailable")
    return int(value.split()[0]) << 10 if value else None


def _rlimit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _chosen(path: Path) -> str | None:
    """The bracketed word of a file such as "always [never] deny"."""
    words = (_text(path) or "").split()
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def _table(path: Path, separator: str) -> dict[str, str]:
    rows = (line.partition(separator) for line in _lines(path))
    return {key: value.strip() for key, _, value in rows}


def _number(path: Path) -> int | None:
    text = _text(path) or ""
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    """Of a name in them only NUL and newline can be excluded."""
    return [line for line in (_text(path) or "").split("\n") if line]


def _text(path: Path) -> str | None:
    try:
        return os.fsdecode(path.read_bytes()).rstrip("\n")
    except OSError:
        return None
