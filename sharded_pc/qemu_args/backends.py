"""Memory backends (`-object memory-backend-*`): who uses them, and how one is moved onto a segment.

A property is kept, replaced by ours, or refused by name; none is dropped silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from sharded_pc.errors import UsageError
from sharded_pc.qemu_args.command_line import CommandLine
from sharded_pc.qemu_args.syntax import Pair, is_json, is_true, size_bytes, write_pairs

HUGE_BYTES = 2 << 20
CANONICAL = "x-use-canonical-path-for-ramblock-id"

_KEPT = ("host-nodes", "policy", "merge", "dump", "reserve")
_OURS = ("qom-type", "id", "size", "mem-path", "align", "share", "seal", "discard-data")
_FOR_PREALLOC = ("prealloc-threads", "prealloc-context")
_REFUSED_IF_ON = {
    "prealloc": "the RAM arrives on demand; remove it",
    "readonly": "the receiver and the guest write the RAM; remove it",
    "rom": "the guest writes its RAM; remove it",
    "pmem": "the RAM is this receiver's memory, not a persistent file; remove it",
    "hugetlb": "expected normal pages; remove it",
    CANONICAL: "the receiver names RAM blocks by their backend's id, and finds the source's block "
    "/objects/ID as well; remove it",
}
_DIMM = "pc-dimm"
_PERSISTENT = ("nvdimm", "virtio-pmem*")


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryBackend:
    """One `-object memory-backend-*` as the user wrote it."""

    at: int
    """its value's place in the command line"""
    pairs: tuple[Pair, ...]
    as_json: bool

    @property
    def values(self) -> dict[str, Any]:
        return dict(self.pairs)

    @property
    def id(self) -> str:
        return str(self.values.get("id", ""))

    @property
    def size(self) -> int:
        """bytes"""
        return size_bytes(self.values.get("size", 0), "B")

    @property
    def is_shared(self) -> bool:
        kind, share = self.values["qom-type"], self.values.get("share")
        by_default = share is None and kind == "memory-backend-memfd"
        return kind == "memory-backend-shm" or by_default or is_true(share)

    def check(self) -> None:
        """UsageError for a property that our file backend cannot have."""
        for key, value in self.pairs:
            where = f"of memory backend {self.id!r}"
            if key in _REFUSED_IF_ON:
                if is_true(value):
                    raise UsageError(f"QEMU property {key}=on {where}: {_REFUSED_IF_ON[key]}")
            elif key == "offset":
                if size_bytes(value, "B"):
                    raise UsageError(f"QEMU property offset={value} {where}: expected 0; remove it")
            elif key == "hugetlbsize":
                raise UsageError(f"QEMU property {key} {where}: {_REFUSED_IF_ON['hugetlb']}")
            elif key not in (*_KEPT, *_OURS, *_FOR_PREALLOC):
                raise UsageError(f"QEMU property {key} {where} is not known here; remove it")

    def moved(self, path: str) -> str:
        """Its option's value, on the segment at `path`."""
        kept = [(key, value) for key, value in self.pairs if key in _KEPT]
        return _write(self.id, self.size, path, kept, self.as_json)


def make(id_: str, size: int, path: str) -> str:
    """A new backend's option value; `size` in bytes."""
    return _write(id_, size, path, [], as_json=False)


def _write(id_: str, size: int, path: str, kept: list[Pair], as_json: bool) -> str:
    ours: list[Pair] = [("qom-type", "memory-backend-file"), ("id", id_), ("size", size)]
    ours.append(("mem-path", path))
    if size >= HUGE_BYTES:  # else QEMU maps it where no huge page fits
        ours.append(("align", HUGE_BYTES))
    # Machine types before 4.0 would call the block of a file backend /objects/ID.
    ours += [("share", True), (CANONICAL, False)]
    return write_pairs([*ours, *kept], "qom-type", as_json)


class Memory:
    """Which backends there are and what they are for.  UsageError if one that is used is not
    there."""

    def __init__(self, line: CommandLine) -> None:
        self._line = line
        self.backends: dict[str, MemoryBackend] = {}
        for option in line.named("-object"):
            pairs = tuple(option.pairs())
            if str(dict(pairs).get("qom-type")).startswith("memory-backend-"):
                backend = MemoryBackend(option.at, pairs, is_json(option.text))
                self.backends[backend.id] = backend

    def machine(self) -> list[MemoryBackend]:
        """What makes the machine's RAM, in address order; [] if QEMU makes it by itself."""
        nodes = [option.values() for option in self._line.named("-numa")]
        ids = [
            str(node["memdev"]) for node in nodes if node.get("type") == "node" and "memdev" in node
        ]
        machine = self._line.merged("-machine")
        if "memory-backend" in machine:
            ids.append(str(machine["memory-backend"]))
        return self._all(ids)

    def segments(self) -> list[MemoryBackend]:
        """What moves onto segments: the machine's RAM, then DIMMs that are there from the start (a
        DIMM's content is in the stream like RAM)."""
        dimms = self._all([id_ for driver, id_ in self._used() if driver == _DIMM])
        return list({each.id: each for each in (*self.machine(), *dimms)}.values())

    def check_others(self) -> None:
        """UsageError for a shared backend that does not become a segment: with x-ignore-shared
        QEMU would leave its content as it is."""
        for driver, id_ in self._used():
            backend = self.backends.get(_bare(id_))
            if driver == _DIMM or backend is None or not backend.is_shared:
                continue
            why = "what it holds would be left out of the migration"
            if any(fnmatchcase(driver, pattern) for pattern in _PERSISTENT):
                why = "its content must stay in its file, which the receiver cannot fill"
            raise UsageError(
                f"QEMU device {driver} on the shared memory backend {backend.id!r}: {why}; give "
                f"the backend share=off, or unplug the device at the source before it migrates"
            )

    def _used(self) -> Iterator[tuple[str, str]]:
        """(driver, backend's id) of each device's link to a backend."""
        for option in self._line.named("-device"):
            values = option.values()
            for key, value in values.items():
                if key.endswith("memdev") or key == "lsa":
                    yield str(values.get("driver")), str(value)

    def _all(self, ids: list[str]) -> list[MemoryBackend]:
        for id_ in ids:
            if _bare(id_) not in self.backends:
                raise UsageError(f"QEMU memory backend {id_!r} has no -object of that id")
        return [self.backends[_bare(id_)] for id_ in ids]


def _bare(id_: str) -> str:
    """A link may be written as a path."""
    return id_.removeprefix("/objects/")
