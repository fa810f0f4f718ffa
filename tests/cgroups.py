"""A control group for a test, version 1 or 2, where one may be made (as root).

A group's own processes are charged for the pages that they bring in, also into shared memory, and
their threads are counted; children are born into it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu import wait_until

ROOT = Path("/sys/fs/cgroup")
GONE_S = 5.0


class Cgroup:
    """`limit` and `usage` are names of files, by the version."""

    def __init__(self, folder: Path, limit: str, usage: str) -> None:
        self.folder, self._limit, self._usage = folder, limit, usage

    @property
    def limit_file(self) -> Path:
        return self.folder / self._limit

    def add(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def used(self) -> int:
        return int((self.folder / self._usage).read_text())

    def limit(self, most: int | str) -> None:
        self.limit_file.write_text(str(most))

    def unlimit(self) -> None:
        v1_memory = self._limit == "memory.limit_in_bytes"
        self.limit("-1" if v1_memory else "max")


FILES = {
    ("memory", 1): ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory", 2): ("memory.max", "memory.current"),
    ("pids", 1): ("pids.max", "pids.current"),
    ("pids", 2): ("pids.max", "pids.current"),
}


@contextlib.contextmanager
def cgroup(controller: str, name: str) -> Iterator[Cgroup]:
    """Skips the test where none can be made."""
    try:
        group = _make(controller, name)
    except OSError as error:
        pytest.skip(f"n/a: may not make a cgroup with {controller}: {error.strerror}")
    try:
        yield group
    finally:
        wait_until(lambda: _removed(group.folder), f"the end of {group.folder}", GONE_S)


def _make(controller: str, name: str) -> Cgroup:
    version_1 = (ROOT / controller).is_dir()
    top = ROOT / controller if version_1 else ROOT
    if not version_1:
        (top / "cgroup.subtree_control").write_text(f"+{controller}")
    folder = top / f"sharded-pc-{name}"
    folder.mkdir()
    group = Cgroup(folder, *FILES[controller, 1 if version_1 else 2])
    try:
        group.unlimit()  # a folder that is no cgroup file system has no such file to be written
        group.used()
    except OSError:
        folder.rmdir()
        raise
    return group


def _removed(folder: Path) -> bool:
    """Not while a process of it is there."""
    with contextlib.suppress(FileNotFoundError):
        try:
            os.rmdir(folder)
        except OSError:
            return False
    return True
