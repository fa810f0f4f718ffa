"""RAM records (wire/ram.py) counted: also of kinds that a receiver refuses, or cannot place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from sharded_pc.dump.wishes import PAGES, Ahead, Skip
from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.native.records import Passed
from sharded_pc.wire import compressed, ram, xbzrle
from sharded_pc.wire import constants as c
from sharded_pc.wire.constants import RamFlag
from sharded_pc.wire.steps import TELL, Parser, number

KINDS = ("normal", "duplicate", "xbzrle", "compressed")
"""As `query-migrate` counts pages."""
_KIND_OF = {
    RamFlag.PAGE: "normal",
    RamFlag.ZERO: "duplicate",
    RamFlag.XBZRLE: "xbzrle",
    RamFlag.COMPRESS_PAGE: "compressed",
}
_KIND_MASK = 0xFFF & ~int(RamFlag.CONTINUE)


@dataclasses.dataclass(frozen=True, slots=True)
class ListedBlock:
    """A block of the list with what may stand beside its size."""

    name: str
    size: int
    page_size: int | None = None
    address: int | None = None
    mapped: tuple[int, int, int, int] | None = None
    """of mapped-ram: version, page size, offset of the bitmap, offset of the pages"""


class Counted:
    """Pages by block and kind, in one section."""

    def __init__(self) -> None:
        self.blocks: dict[str, dict[str, Passed]] = {}
        self.flushes = 0
        self.hooks = 0

    def of(self, block: str) -> dict[str, Passed]:
        return self.blocks.setdefault(block, {kind: Passed() for kind in KINDS})


class AnyBlock(Mapping):
    """Where no block list was read every name is one's."""

    def __getitem__(self, name: str) -> RamBlock:
        return RamBlock(name, c.MAX_RAM_BYTES)

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator:
        return iter(())

    def __len__(self) -> int:
        return 1  # there are some


class Records(ram.Channel):
    """A channel's records; `counted` has those of the section that is read."""

    def __init__(self, blocks: Mapping[str, RamBlock], capabilities: tuple[str, ...] = ()) -> None:
        super().__init__(blocks)
        self.capabilities = capabilities
        self.page_sizes = PAGE_BYTES
        """as POSTCOPY_ADVISE says"""
        self.listed: tuple[ListedBlock, ...] = ()
        self.counted = Counted()
        self.may_end = False
        """without EOS, with the wire"""

    @property
    def current(self) -> RamBlock | None:
        """The block that CONTINUE means."""
        return self._block

    def use(self, blocks: Mapping[str, RamBlock]) -> None:
        """What list the names are looked up in, from now on."""
        self._blocks = blocks

    def records(self) -> Parser:
        """One section's records, through EOS."""
        while True:
            yield PAGES
            if self.may_end and not (yield Ahead(1)):
                return
            at = yield TELL
            header = yield from number(8)
            try:
                if (yield from self._record(header)):
                    return
            except RemoteProtocolError as error:
                error.offset = at if error.offset is None else error.offset
                raise

    def _record(self, header: int) -> Parser:
        flags = RamFlag(header & _KIND_MASK)
        match header & 0xFFF:
            case RamFlag.EOS:
                return True
            case RamFlag.MEM_SIZE:
                yield from self._list(header)
            case RamFlag.MULTIFD_FLUSH:
                self.counted.flushes += 1
            case RamFlag.HOOK:
                self.counted.hooks += 1
            case _ if flags in _KIND_OF:
                yield from self._page(header)
            case _:
                raise ram.bad_flags(header)
        return False

    def _page(self, header: int) -> Parser:
        if not self._blocks:
            raise ram.before_block_list(header)
        block = yield from self._locate(header)
        self._block = block
        offset, kind = header & ram.OFFSET_MASK, RamFlag(header & _KIND_MASK)
        if offset >= block.size:
            raise ram.outside_block(header, block)
        yield from _CONTENTS[kind](header)
        self.counted.of(block.name)[_KIND_OF[kind]].add(offset)

    def _list(self, header: int) -> Parser:
        if self.listed:
            raise ram.second_block_list()
        listed: list[ListedBlock] = []
        left = header & ram.OFFSET_MASK
        while left > 0:
            if len(listed) == c.MAX_BLOCKS:
                raise RemoteProtocolError(f"more than {c.MAX_BLOCKS} RAM blocks")
            block = yield from self._listed()
            left -= block.size
            listed.append(block)
            self.listed = tuple(listed)
        self.use({block.name: RamBlock(block.name, block.size) for block in listed})

    def _listed(self) -> Parser:
        """With x-ignore-shared an address stands there, with mapped-ram where the pages are."""
        block = yield from ram.one_block(self.page_sizes)
        page_size = None if block.source_page_size == PAGE_BYTES else block.source_page_size
        address = mapped = None
        if "x-ignore-shared" in self.capabilities:
            address = yield from number(8)
        if "mapped-ram" in self.capabilities:
            mapped = yield from _mapped(block.size)
        return ListedBlock(block.name, block.size, page_size, address, mapped)


def _mapped(size: int) -> Parser:
    """A block's pages stand in the file itself, not in the stream (QEMU migration/ram.c
    MappedRamHeader)."""
    version = yield from number(4)
    page_size = yield from number(8)
    bitmap = yield from number(8)
    pages = yield from number(8)
    at = yield TELL
    if pages + size < at:
        raise RemoteProtocolError(f"mapped-ram pages at {pages:#x}, before their header")
    yield Skip(pages + size - at)
    return version, page_size, bitmap, pages


def _plain(header: int) -> Parser:
    yield Skip(PAGE_BYTES)


def _zero(header: int) -> Parser:
    if fill := (yield from number(1)):
        raise ram.bad_fill(fill, header)


def _xbzrle(header: int) -> Parser:
    """u8 1, be16 length, a delta against the page that is there."""
    mark = yield from number(1)
    size = yield from number(2)
    if mark != xbzrle.ENCODING:
        raise ram.bad_encoding(mark, header)
    if size > PAGE_BYTES:
        raise ram.bad_length(size, header)
    yield Skip(size)


def _compressed(header: int) -> Parser:
    """be32 length, zlib data."""
    size = yield from number(4)
    if size > compressed.MOST_BYTES:
        raise ram.bad_length(size, header)
    yield Skip(size)


_CONTENTS = {
    RamFlag.PAGE: _plain,
    RamFlag.ZERO: _zero,
    RamFlag.XBZRLE: _xbzrle,
    RamFlag.COMPRESS_PAGE: _compressed,
}
