"""The kernel's out-of-memory killer: whether it was at work, who it is to take, and the remedy.

Sources: proc(5) on oom_score_adj; the kernel's include/linux/vm_event_item.h (OOM_KILL counts
those of every memory cgroup too).
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from sharded_pc.host.limits import Limits

FIRST = 1000
"""oom_score_adj of who goes before everybody else."""
RECENT_SECONDS = 2.0
"""From a kill to the end of the process that was killed is less."""


def kills() -> int:
    """How often it has killed since this machine's start; 0 where that is not told."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


class Recent:
    """Whether it has killed in the last seconds; somebody has to look() again and again."""

    def __init__(self) -> None:
        self._before = self._now = kills()
        self._looked = time.monotonic()

    def look(self) -> None:
        if time.monotonic() - self._looked >= RECENT_SECONDS:
            self._before, self._now = self._now, kills()
            self._looked = time.monotonic()

    def any(self) -> bool:
        return kills() > self._before


def be_first() -> None:
    """This process's death harms nobody: better this one than a guest."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(FIRST))


def remedy() -> str:
    group = Limits.read().cgroup
    where = "the machine" if group is None else f"the cgroup (limit {group.limit} in {group.file})"
    return f"memory ran out in {where}, the kernel's OOM killer was at work: make room there"
