"""Whether those that QEMU hands its RAM to are guests of this receiver, before a source connects.

It is a courtesy: while pages are missing, QEMU's library sends what no other process can map
(attach/preload/hold.c), so one that is no guest can only fail, but that would be the guest's disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sharded_pc.attach import program
from sharded_pc.errors import UsageError
from sharded_pc.qemu_args import BackEnd

log = logging.getLogger(__name__)

_REMEDY = "start it by `sharded-pc guest -- PROGRAM ARGS`, before this receiver"


def check_guests(back_ends: Iterable[BackEnd]) -> None:
    """UsageError for one that nobody serves yet, or that is no guest.  Who may not be looked at is
    let through."""
    for each in back_ends:
        inodes = _sockets_at(each.path)
        if not inodes:
            raise UsageError(f"QEMU {each.what}: nobody listens at {each.path}; {_REMEDY}")
        found = list(_holders(inodes))
        if not found:
            log.warning("QEMU %s: who listens at %s may not be looked at; if it is no guest of "
                        "this receiver, QEMU's device will fail", each.what, each.path)  # fmt: skip
        elif not any(map(_is_guest, found)):
            raise UsageError(
                f"QEMU {each.what}: its back-end (process {found[0]} at {each.path}) would map the "
                f"RAM without a userfaultfd and read zeros; {_REMEDY}"
            )


def _sockets_at(path: str) -> set[str]:
    """What /proc/PID/fd says of those bound to the path (proc(5), /proc/net/unix)."""
    wanted = {path, os.path.abspath(path)}
    found = set()
    for line in Path("/proc/net/unix").read_bytes().splitlines():
        words = line.split(maxsplit=7)
        if len(words) == 8 and os.fsdecode(words[7]) in wanted:
            found.add(f"socket:[{int(words[6])}]")
    return found


def _holders(sockets: set[str]) -> Iterator[int]:
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if any(os.readlink(fd) in sockets for fd in _descriptors(entry.path)):
                yield int(entry.name)


def _descriptors(process: str) -> Iterator[str]:
    for fd in os.listdir(f"{process}/fd"):
        path = f"{process}/fd/{fd}"
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            os.readlink(path)
            yield path


def _is_guest(pid: int) -> bool:
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return False
    return program.FILE.encode() in maps
