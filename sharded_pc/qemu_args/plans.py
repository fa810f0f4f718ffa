"""The plan: what is asked of QEMU, which of the source's blocks it shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from sharded_pc.geometry import RamBlock
from sharded_pc.qemu_args import refusals
from sharded_pc.qemu_args.backends import Memory, make
from sharded_pc.qemu_args.command_line import CommandLine
from sharded_pc.qemu_args.matching import Wanted, backend_id, match
from sharded_pc.qemu_args.syntax import size_bytes

_DEFAULT_ID = "pc.ram"
"""How a PC calls its RAM if the user does not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """One shared memory backend of the destination and the source's block it stands for."""

    id: str
    """the destination's RAMBlock name"""
    block: RamBlock
    """the source's block"""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How the destination is started, and which of the source's blocks it shares."""

    arguments: tuple[str, ...]
    backends: tuple[Backend, ...]
    """the machine's RAM in address order, then DIMMs"""


def check_arguments(arguments: Sequence[str]) -> None:
    """Everything that can be refused before the source's blocks are known; UsageError."""
    line = CommandLine(arguments)
    refusals.check(line)
    memory = Memory(line)
    memory.check_others()
    for backend in memory.segments():
        backend.check()
    _wanted(line, memory)


def plan(arguments: Sequence[str], blocks: Iterable[RamBlock], paths: Mapping[str, str]) -> Plan:
    """The destination's command line on our segments.

    `arguments` is the user's (a wrapper's words may stand before QEMU), `blocks` the source's,
    `paths` the segment's file for each source block's name.  UsageError names what does not fit.
    """
    check_arguments(arguments)
    line = CommandLine(arguments)
    memory = Memory(line)
    wanted = _wanted(line, memory)
    others = set(memory.backends) - {each.id for each in wanted}
    found = match(wanted, [block for block in blocks if block.name in paths], others)
    words, backends = list(arguments), []
    if not memory.machine():
        words += _default_ram(found[0], paths[found[0].name])
        backends.append(Backend(backend_id(found[0]), found[0]))
    for own, block in zip(memory.segments(), found[len(backends) :], strict=True):
        words[own.at] = own.moved(paths[block.name])
        backends.append(Backend(own.id, block))
    given = [] if line.named("-incoming") else ["-incoming", "defer"]
    return Plan((*words, *given), tuple(backends))


def _wanted(line: CommandLine, memory: Memory) -> list[Wanted]:
    """The machine's RAM, then what `Memory.segments` tells more."""
    own = [Wanted(f"QEMU memory backend {o.id!r}", o.id, o.size) for o in memory.segments()]
    if memory.machine():
        return own
    return [Wanted("the destination's RAM (-m)", _DEFAULT_ID, _main_size(line)), *own]


def _main_size(line: CommandLine) -> int:
    own = line.merged("-m").get("size")
    if own is not None:
        return size_bytes(own, "M")
    machine = line.merged("-machine")
    nested = machine.get("memory")
    own = nested.get("size") if isinstance(nested, dict) else machine.get("memory.size")
    return size_bytes(own, "B") if own is not None else 128 << 20  # QEMU's default


def _default_ram(block: RamBlock, path: str) -> tuple[str, ...]:
    id_ = backend_id(block)
    return ("-object", make(id_, block.size, path), "-machine", f"memory-backend={id_}")
