"""A destination's RAM blocks against the source's: what does not fit is found while the source's
guest still runs.  Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from sharded_pc.errors import UsageError
from sharded_pc.geometry import RamBlock

_LINE = re.compile(
    r"\s*(?P<name>\S.*?)\s+\d+ [KMGT]?i?B\s+0x[0-9a-f]+"
    r"\s+0x(?P<used>[0-9a-f]+)\s+0x(?P<most>[0-9a-f]+)"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """A block as QEMU's `info ramblock` lists it; bytes."""

    used: int
    most: int
    """it can be resized to, as a stream demands"""

    def takes(self, size: int) -> bool:
        resizable = self.used != self.most
        return size == self.used or (resizable and size <= self.most)


def parse(text: str) -> dict[str, Listed]:
    """`info ramblock`'s table (QEMU exec.c ram_block_format), by name; {} if this is none."""
    found = (_LINE.match(line) for line in text.splitlines())
    return {m["name"]: Listed(int(m["used"], 16), int(m["most"], 16)) for m in found if m}


def compare(wanted: Iterable[RamBlock], ours: Mapping[str, Listed]) -> None:
    """UsageError names what the destination lacks or has in another size.  `wanted`: the source's
    blocks under the destination's names."""
    wrong = [_objection(block, ours) for block in wanted]
    if found := [why for why in wrong if why]:
        raise UsageError(
            f"the destination does not fit the source: {'; '.join(found)}; start it with the "
            f"source's devices and sizes"
        )


def _objection(block: RamBlock, ours: Mapping[str, Listed]) -> str | None:
    listed = ours.get(block.name)
    if listed is None:
        return f"it has no RAM block {block.name!r} ({size_text(block.size)})"
    if not listed.takes(block.size):
        mine, theirs = size_text(listed.used), size_text(block.size)
        return f"its RAM block {block.name!r} has {mine}, the source's {theirs}"
    return None


def size_text(size: int) -> str:
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} bytes"
