"""What all messages come to: blocks and counts, whose number does not grow with the stream."""

from __future__ import annotations

from collections.abc import Iterable

from sharded_pc.dump.records import KINDS, ListedBlock
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.wire.constants import MAX_BLOCKS


class Totals:
    """`blocks` in the list's order, then those that only records name."""

    def __init__(self) -> None:
        self.blocks: dict[str, dict] = {}
        self.machine: str | None = None
        self.counts: dict[str, int] = {}

    def define(self, listed: Iterable[ListedBlock]) -> None:
        for block in listed:
            self._block(block.name)["size"] = block.size

    def _block(self, name: str) -> dict:
        if name not in self.blocks and len(self.blocks) > MAX_BLOCKS:
            name = "others"  # random bytes may name any number of them
        return self.blocks.setdefault(name, {"name": name})

    def add(self, message: dict) -> None:
        kind = message.get("type", "records")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.machine = message.get("machine", self.machine)
        for told in message.get("ram", ()):
            self._add_pages(self._block(told["block"]), told)
        if message.get("command") == "postcopy-ram-discard":
            self._discard(message)

    def _add_pages(self, block: dict, told: dict) -> None:
        for kind in (kind for kind in KINDS if kind in told):
            block[kind] = block.get(kind, 0) + told[kind]["pages"]

    def _discard(self, message: dict) -> None:
        block = self._block(message["block"])
        pages = sum(each["length"] for each in message["ranges"]) // PAGE_BYTES
        block["discarded-pages"] = block.get("discarded-pages", 0) + pages
        block["discard-ranges"] = block.get("discard-ranges", 0) + len(message["ranges"])

    def ram(self) -> dict:
        """Sums over all blocks, as `query-migrate` has them."""
        each = self.blocks.values()
        out = {"total": sum(block.get("size", 0) for block in each)}
        keys = (*KINDS, "discarded-pages")
        return out | {key: sum(block.get(key, 0) for block in each) for key in keys}
