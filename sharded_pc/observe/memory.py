"""What a process of the receiver holds in memory, by proc(5)."""

from __future__ import annotations

from pathlib import Path

_FIELDS = {"VmHWM": "peak-rss", "RssAnon": "anonymous", "VmPTE": "page-tables"}


def process_memory(pid: int) -> dict[str, int] | None:
    """Bytes: `peak-rss` (its largest resident set, shared guest RAM that it mapped included),
    `anonymous` (its own memory now) and `page-tables` (now); None if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    words = (line.split() for line in lines)
    sizes = {
        _FIELDS[name]: int(rest[0]) << 10
        for first, *rest in words
        if (name := first.rstrip(":")) in _FIELDS
    }
    return sizes or None  # a process that has ended has a status without memory
