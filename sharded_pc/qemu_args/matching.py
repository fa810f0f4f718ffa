"""Which of the source's RAM blocks a destination's backend stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from sharded_pc.errors import UsageError
from sharded_pc.geometry import RamBlock

_PATH = "/objects/"
"""Before an id: how machine types before 4.0 call some backends' blocks."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """A stretch of the destination's RAM that becomes a segment."""

    what: str
    """for messages"""
    id: str
    size: int
    """bytes"""


def backend_id(block: RamBlock) -> str:
    """The id of the backend that has made the block."""
    return block.name.removeprefix(_PATH)


def match(
    wanted: Sequence[Wanted], blocks: Sequence[RamBlock], others: Collection[str] = ()
) -> list[RamBlock]:
    """For each of `wanted` the source's block.  By name; a size decides only what it alone can
    decide.  `others` are ids of backends that keep their blocks.  UsageError."""
    by_id = {backend_id(block): block for block in blocks}
    found = {each.id: by_id[each.id] for each in wanted if each.id in by_id}
    for each in wanted:
        if each.id in found and found[each.id].size != each.size:
            raise _no_fit(each, blocks)
    free = [block for id_, block in by_id.items() if id_ not in {*found, *others}]
    rest = [each for each in wanted if each.id not in found]
    for each in rest:
        found[each.id] = _by_size(each, [o for o in rest if o.size == each.size], free)
    return [found[each.id] for each in wanted]


def _by_size(wanted: Wanted, rivals: Sequence[Wanted], free: Sequence[RamBlock]) -> RamBlock:
    # A slash is in no backend's id: such a block is a device's (0000:00:02.0/vga.vram).
    fits = [b for b in free if b.size == wanted.size and "/" not in backend_id(b)]
    if not fits:
        raise _no_fit(wanted, free)
    if len(fits) == 1 and len(rivals) == 1:
        return fits[0]
    names = ", ".join(each.what for each in rivals if each is not wanted)
    also = f", which {names} could be as well" if names else ""
    raise UsageError(
        f"{wanted.what} of {_size(wanted.size)} could be the source's {_listed(fits)}{also}; give "
        f"its -object the name of the source's block: id=NAME"
    )


def _no_fit(wanted: Wanted, blocks: Sequence[RamBlock]) -> UsageError:
    return UsageError(
        f"{wanted.what} of {_size(wanted.size)} fits no RAM block of the source "
        f"({_listed(blocks)}); start the destination with the source's memory size"
    )


def _listed(blocks: Sequence[RamBlock]) -> str:
    return ", ".join(f"{block.name} {_size(block.size)}" for block in blocks)


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
