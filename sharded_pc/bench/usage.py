"""What running processes have used: CPU time to the nanosecond, memory as the kernel counts it."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_CPUCLOCK_SCHED = 2
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads, ended ones included; ProcessLookupError.

    The clock of clock_getcpuclockid(3): /proc/PID/stat counts in ticks of 10 ms.
    """
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        raise ProcessLookupError(f"no process {pid}") from None


def tree(root: int) -> list[int]:
    """`root` and all that descends from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def tree_cpu_seconds(pids: Iterable[int]) -> float:
    """Of those that still live."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            total += cpu_seconds(pid)
    return total


def memory(pid: int) -> dict[str, int]:
    """Bytes: `peak` (VmHWM, shared pages it has mapped included), `private` (RssAnon now)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    named = {"peak": "VmHWM", "private": "RssAnon"}
    return {key: int(fields[name].split()[0]) << 10 for key, name in named.items()}


def dies_with_us(number: signal.Signals) -> Callable[[], None]:
    """A preexec_fn: the child gets the signal when the thread that started it ends."""
    return lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
