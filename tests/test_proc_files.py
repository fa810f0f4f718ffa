"""What /proc says of others holds names that may be any bytes but NUL and newline."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

import pytest

from sharded_pc.attach import guests, mappings
from sharded_pc.host import limits
from sharded_pc.observe import memory

ODD = b"odd\r\x0c \xff\xc2\x85 1-2 x\x1e"


@pytest.fixture
def mapped(tmp_path: Path):
    """The inode of a file with an odd name that is mapped here."""
    path = os.path.join(os.fsencode(tmp_path), ODD)
    with open(path, "w+b") as file:
        file.truncate(8192)
        with mmap.mmap(file.fileno(), 8192):
            yield os.fstat(file.fileno()).st_ino


def test_mappings(mapped: int) -> None:
    (found,) = [each for each in mappings.mappings_of(os.getpid()) if each.inode == mapped]
    assert found.end - found.start == 8192 and found.shared


def test_huge_pages(mapped: int) -> None:
    assert memory.huge_bytes(os.getpid(), {mapped}) == 0


def test_parents() -> None:
    say = "printf '\\377) 1 \\r2\\n' >/proc/$$/comm; echo; read line"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["sh", "-c", say], **pipes) as child:
        assert child.stdout.readline() == b"\n"
        assert b"\xff" in Path(f"/proc/{child.pid}/comm").read_bytes()
        assert os.getpid() in guests._ancestry(child.pid)


def test_mounts(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    table = b"22 1 0:21 / /mnt/" + ODD.replace(b" ", b"\\040") + b" rw shared:7 - tmpfs tmpfs rw\n"
    (tmp_path / "proc/self/mountinfo").write_bytes(table * 2)
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/" + ODD + b"\n")
    assert [mount.fstype for mount in limits._mounts(tmp_path)] == ["tmpfs", "tmpfs"]
    assert list(limits._memberships(tmp_path)) == [("", "/" + os.fsdecode(ODD))]
