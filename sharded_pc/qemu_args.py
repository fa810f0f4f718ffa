"""A destination QEMU's command line, made to run on our segments.

Pure: arguments in, arguments out.  The main RAM (`-m`, `-machine memory-backend=`, `-numa
node,memdev=`) becomes a shared file backend on the segment of the source's block; everything else
stays as the user wrote it.  What cannot be combined is refused by name before anything starts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence

from sharded_pc.errors import UsageError
from sharded_pc.geometry import RamBlock

_REFUSED = {
    "-daemonize": "QEMU must stay this command's child",
    "-mem-path": "the RAM comes from this receiver; remove it",
    "-mem-prealloc": "the RAM arrives on demand; remove it",
    "-preconfig": "QEMU must reach its incoming migration by itself",
    "-loadvm": "the guest's state comes from the source",
    "-readconfig": "put its options on the command line, where they can be seen",
}
_REFUSED_DEVICES = {
    "vfio-pci": "a passed-through device cannot wait for a page",
    "virtio-mem-pci": "its plugged memory is not in the stream",
}
HUGE_BYTES = 2 << 20

_VALUED = ("-m", "-machine", "-M", "-object", "-numa", "-incoming", "-overcommit", "-device")
_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """One shared memory backend of the destination and the source's block it stands for."""

    id: str
    """the destination's RAMBlock name"""
    block: RamBlock
    """the source's block"""
    address: int
    """bytes from the start of the machine's RAM: MemoryRegion.addr, which QEMU compares"""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How the destination is started, and which of the source's blocks it shares."""

    arguments: tuple[str, ...]
    backends: tuple[Backend, ...]


def split_options(text: str) -> dict[str, str]:
    """'a,b=c,d=e,,f' -> {'': 'a', 'b': 'c', 'd': 'e,f'} (QemuOpts: a comma is doubled)."""
    parts = re.split(r"(?<!,),(?!,)", text)
    out: dict[str, str] = {}
    for index, part in enumerate(part.replace(",,", ",") for part in parts):
        key, equals, value = part.partition("=")
        if equals:
            out[key] = value
        elif index == 0:
            out[""] = part
        else:
            out[part] = "on"
    return out


def join_options(options: Mapping[str, str]) -> str:
    """The inverse of split_options."""
    escaped = {key: value.replace(",", ",,") for key, value in options.items()}
    head = [escaped.pop("")] if "" in escaped else []
    return ",".join([*head, *(f"{key}={value}" for key, value in escaped.items())])


def size_bytes(text: str, unit: str) -> int:
    """QEMU's size: a number of `unit` (MiB for -m, bytes for objects), or with a suffix of its own;
    UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([BKMGT]?)(?:i?B)?", text.strip().upper())
    if not match:
        raise UsageError(f"memory size {text!r}: expected a number such as 512, 512M or 4G")
    return int(float(match[1]) * _UNITS[match[2] or unit])


class _Options:
    """The options that matter, with their places in the command line."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self.found: list[tuple[str, int]] = []
        for index, word in enumerate(self.arguments):
            option = "-" + word.lstrip("-") if word.startswith("-") else ""
            if option in _REFUSED:
                raise UsageError(f"QEMU option {word}: {_REFUSED[option]}")
            if option in _VALUED and index + 1 < len(self.arguments):
                self.found.append((option, index + 1))

    def values(self, *names: str) -> list[dict[str, str]]:
        return [
            split_options(self.arguments[at])
            for name, at in self.found
            if name in names and not self.arguments[at].startswith("{")
        ]

    def objects(self) -> dict[str, tuple[int, dict[str, str]]]:
        """Memory backends by id: place of the value, its keys."""
        out = {}
        for name, at in self.found:
            if name != "-object":
                continue
            keys = _object_keys(self.arguments[at])
            if keys.get("", "").startswith("memory-backend-"):
                out[keys.get("id", "")] = (at, keys)
        return out


def _object_keys(text: str) -> dict[str, str]:
    if not text.startswith("{"):
        keys = split_options(text)
        return keys if "" in keys else {"": keys.pop("qom-type", ""), **keys}
    try:
        raw = json.loads(text)
    except ValueError:
        raise UsageError(f"QEMU option -object {text[:60]!r} is not JSON") from None
    kind = raw.pop("qom-type", raw.pop("driver", ""))
    return {"": kind, **{key: str(value) for key, value in raw.items()}}


def _check(options: _Options) -> None:
    for name, at in options.found:
        value = options.arguments[at]
        if name == "-incoming" and value != "defer":
            raise UsageError(
                f"QEMU option -incoming {value}: the stream comes through this receiver"
            )
        if name == "-overcommit" and split_options(value).get("mem-lock") == "on":
            raise UsageError(
                "QEMU option -overcommit mem-lock=on: RAM that arrives on demand "
                "cannot be locked; remove it"
            )
        driver = _object_keys(value).get("", "") if name == "-device" else ""
        if driver in _REFUSED_DEVICES:
            raise UsageError(f"QEMU device {driver}: {_REFUSED_DEVICES[driver]}")


def _main_size(options: _Options) -> int:
    sizes = options.values("-m")
    if not sizes:
        return 128 << 20  # QEMU's default
    return size_bytes(sizes[-1].get("size") or sizes[-1].get("", "128"), "M")


def _wanted(options: _Options) -> list[tuple[str, int]]:
    """(id, bytes) of the backends that make the machine's RAM, in address order; [] if the machine
    makes its own."""
    objects = options.objects()
    nodes = [n["memdev"] for n in options.values("-numa") if n.get("") == "node" and "memdev" in n]
    machine: dict[str, str] = {}
    for value in options.values("-machine", "-M"):
        machine.update(value)
    ids = nodes or ([machine["memory-backend"]] if "memory-backend" in machine else [])
    out = []
    for id_ in ids:
        if id_ not in objects:
            raise UsageError(f"QEMU memory backend {id_!r} has no -object of that id")
        keys = objects[id_][1]
        if keys.get("hugetlb") in ("on", "True", "true"):
            raise UsageError(f"QEMU memory backend {id_!r} with hugetlb=on: expected normal pages")
        out.append((id_, size_bytes(keys.get("size", "0"), "B")))
    return out


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _match(id_: str, size: int, free: list[RamBlock], what: str) -> RamBlock:
    """The source's block for a destination's backend: the same name, else the only one of its
    size."""
    named = [block for block in free if block.name == id_]
    sized = [block for block in free if block.size == size]
    found = named or (sized if len(sized) == 1 else sized[:1])
    if not found or found[0].size != size:
        listed = ", ".join(f"{b.name} {_size(b.size)}" for b in free)
        raise UsageError(
            f"{what} of {_size(size)} fits no RAM block of the source ({listed}); start the "
            f"destination with the source's memory size"
        )
    free.remove(found[0])
    return found[0]


def _file_backend(id_: str, size: int, path: str) -> str:
    options = {"": "memory-backend-file", "id": id_, "size": f"{size}B", "mem-path": path}
    if size >= HUGE_BYTES:  # else QEMU maps it where no huge page fits
        options["align"] = f"{HUGE_BYTES}B"
    return join_options({**options, "share": "on"})


def check_arguments(arguments: Sequence[str]) -> None:
    """Everything that can be refused before the source's blocks are known; UsageError."""
    if not arguments:
        raise UsageError("no QEMU given: sharded-pc run INCOMING -- qemu-system-x86_64 ARGS")
    options = _Options(arguments)
    _check(options)
    _main_size(options)
    _wanted(options)


def plan(arguments: Sequence[str], blocks: Iterable[RamBlock], paths: Mapping[str, str]) -> Plan:
    """The destination's command line on our segments.

    `arguments` is the user's (program first), `blocks` the source's, `paths` the segment's file for
    each source block's name.  UsageError names what does not fit.
    """
    check_arguments(arguments)
    options = _Options(arguments)
    free = [block for block in blocks if block.name in paths]
    wanted = _wanted(options)
    if not wanted:
        return _plan_default(options, free, paths)
    backends, address = [], 0
    objects = options.objects()
    for id_, size in wanted:
        block = _match(id_, size, free, f"QEMU memory backend {id_!r}")
        backends.append(Backend(id_, block, address))
        options.arguments[objects[id_][0]] = _file_backend(id_, size, paths[block.name])
        address += size
    return Plan(_with_incoming(options), tuple(backends))


def _plan_default(options: _Options, free: list[RamBlock], paths: Mapping[str, str]) -> Plan:
    size = _main_size(options)
    block = _match("pc.ram", size, free, "the destination's RAM (-m)")
    options.arguments += [
        "-object",
        _file_backend(block.name, size, paths[block.name]),
        "-machine",
        f"memory-backend={block.name}",
    ]
    return Plan(_with_incoming(options), (Backend(block.name, block, 0),))


def _with_incoming(options: _Options) -> tuple[str, ...]:
    given = any(name == "-incoming" for name, _ in options.found)
    return (*options.arguments, *(() if given else ("-incoming", "defer")))
