"""What a process of the receiver holds in memory, by proc(5)."""

from __future__ import annotations

from collections.abc import Container
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


def huge_bytes(pid: int, inodes: Container[int]) -> int:
    """Bytes of these shared-memory files that the process has mapped by huge pages (proc(5), smaps:
    ShmemPmdMapped); 0 if it is gone or may not be looked at."""
    try:
        # As bytes: a file's name may hold anything that text would be cut at.
        lines = Path(f"/proc/{pid}/smaps").read_bytes().split(b"\n")[:-1]
    except OSError:
        return 0
    ours, found = False, 0
    for line in lines:
        first, *rest = line.split()
        if b"-" in first:  # START-END FLAGS OFFSET DEVICE INODE PATH
            ours = int(rest[3]) in inodes
        elif ours and first == b"ShmemPmdMapped:":
            found += int(rest[0]) << 10
    return found
