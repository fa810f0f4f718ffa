"""The plan: what is asked of QEMU, and later which of the source's blocks it shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from sharded_pc.geometry import RamBlock
from sharded_pc.qemu_args import matching, refusals
from sharded_pc.qemu_args.back_ends import BackEnd, back_ends
from sharded_pc.qemu_args.backends import Memory, make
from sharded_pc.qemu_args.command_line import CommandLine
from sharded_pc.qemu_args.matching import Wanted
from sharded_pc.qemu_args.syntax import size_bytes

_DEFAULT_IDS = {"microvm": "microvm.ram"}
_DEFAULT_ID = "pc.ram"
"""How a machine calls its RAM if the user does not (MachineClass.default_ram_id)."""
_RAM_ALIGN = 8192
"""QEMU rounds -m up to it (softmmu/vl.c, system/vl.c: parse_memory_options)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """One shared memory backend of the destination and the source's block it stands for."""

    id: str
    """the destination's RAMBlock name"""
    block: RamBlock
    """the source's block"""


def check_arguments(arguments: Sequence[str]) -> tuple[BackEnd, ...]:
    """Everything that can be refused before the source's blocks are known; UsageError.  Who has to
    be a guest of the receiver too."""
    line = CommandLine(arguments)
    refusals.check(line)
    memory = Memory(line)
    memory.check_others()
    for backend in memory.segments():
        backend.check()
    _wanted(line, memory)
    return back_ends(line)


def backends(arguments: Sequence[str]) -> tuple[RamBlock, ...]:
    """The memory backends that become segments, by their ids: the machine's RAM in address order,
    then DIMMs.  UsageError."""
    check_arguments(arguments)
    line = CommandLine(arguments)
    return tuple(RamBlock(each.id, each.size) for each in _wanted(line, Memory(line)))


def plan(arguments: Sequence[str], paths: Mapping[str, str]) -> tuple[str, ...]:
    """The destination's command line on our segments.

    `arguments` is the user's (a wrapper's words may stand before QEMU), `paths` the segment's file
    for each of `backends(arguments)`, by its id.  UsageError.
    """
    line = CommandLine(arguments)
    memory = Memory(line)
    words = list(arguments)
    if not memory.machine():
        own = _wanted(line, memory)[0]
        words += ("-object", make(own.id, own.size, paths[own.id]))
        words += ("-machine", f"memory-backend={own.id}")
    for backend in memory.segments():
        words[backend.at] = backend.moved(paths[backend.id])
    given = [] if line.named("-incoming") else ["-incoming", "defer"]
    return (*words, *given)


def match(arguments: Sequence[str], blocks: Iterable[RamBlock]) -> tuple[Backend, ...]:
    """Which of the source's `blocks` each of `backends(arguments)` stands for, in their order;
    UsageError names what does not fit."""
    line = CommandLine(arguments)
    memory = Memory(line)
    wanted = _wanted(line, memory)
    others = set(memory.backends) - {each.id for each in wanted}
    found = matching.match(wanted, list(blocks), others)
    return tuple(Backend(own.id, block) for own, block in zip(wanted, found, strict=True))


def _wanted(line: CommandLine, memory: Memory) -> list[Wanted]:
    """The machine's RAM, then what `Memory.segments` tells more."""
    own = [Wanted(f"QEMU memory backend {o.id!r}", o.id, o.size) for o in memory.segments()]
    if memory.machine():
        return own
    machine = str(line.merged("-machine").get("type"))
    id_ = _DEFAULT_IDS.get(machine, _DEFAULT_ID)
    return [Wanted("the destination's RAM (-m)", id_, _main_size(line)), *own]


def _main_size(line: CommandLine) -> int:
    own = line.merged("-m").get("size")
    unit = "M"
    if own is None:
        machine = line.merged("-machine")
        nested = machine.get("memory")
        own = nested.get("size") if isinstance(nested, dict) else machine.get("memory.size")
        unit = "B"
    size = size_bytes(own, unit) if own is not None else 128 << 20  # QEMU's default
    return -(-size // _RAM_ALIGN) * _RAM_ALIGN
