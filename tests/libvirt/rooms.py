"""What a host sees otherwise than this machine: the script of its first process makes it."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.qemu.backports import TRIPLET, QemuBinary

OF_QEMU = (
    "usr/bin/qemu-system-x86_64", f"usr/lib/{TRIPLET}/qemu", "usr/share/qemu", "usr/share/seabios",
)  # fmt: skip
"""A QEMU by its compiled-in names: libvirt's probing finds no modules by any other."""
OURS = {"run": "run", "lib": "var/lib", "cache": "var/cache", "log": "var/log", "etc": "etc"}
"""Folders of a host, and where they stand in it."""
HERE = "host-etc"
"""This machine's /etc, seen in the host's /run; the host's /etc has links to it."""
OPEN = (Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[2])
"""What runs us, which QEMU's user must be able to enter."""
HOME = Path.home()
START = f"""
set -e
mount --rbind /etc {{folder}}/run/{HERE}
"""
DEV = """
mkdir {folder}/dev
mount -t tmpfs -o mode=755 tmpfs {folder}/dev
cp --archive --one-file-system /dev/. {folder}/dev  # nodes whose owner and mode a test may change
mount --rbind /dev/pts {folder}/dev/pts
mount -t tmpfs -o mode=1777 tmpfs {folder}/dev/shm
umount --lazy /dev  # libvirt moves each mount below it, and would meet hidden ones
mount --move {folder}/dev /dev
"""
END = """
echo ready
exec env --ignore-signal=CHLD cat  # the kernel reaps what is handed to the first process
"""


def script(folder: Path, binary: QemuBinary) -> str:
    """For a shell in mount and PID namespaces of its own; says "ready", ends with its input."""
    binds = [(folder / name, place) for name, place in OURS.items()]
    root = binary.path.parents[2]
    if root != Path("/"):
        binds += [(root / each, each) for each in OF_QEMU]
    lines = [f"mount --rbind {source} /{place}" for source, place in binds]
    return "\n".join(
        [START.format(folder=folder), *lines, DEV.format(folder=folder), *_home(), END]
    )


def _home() -> list[str]:
    """In place of a home that is closed to others, one that has only what runs us."""
    inside = [each for each in OPEN if each.is_relative_to(HOME)]
    if not inside or HOME.stat().st_mode & 0o001:
        return []
    lines = ["mkdir /run/home", f"mount --rbind {HOME} /run/home"]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {HOME}"]
    for each in inside:
        lines += [f"mkdir -p {each}", f"mount --rbind /run/home/{each.relative_to(HOME)} {each}"]
    return lines
