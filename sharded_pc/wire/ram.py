"""Records of a `ram` section (QEMU migration/ram.c): the reference, and the texts of its errors.

A record is be64 (offset | flags), then, unless CONTINUE, the block's name (u8 length, bytes), then
what the kind asks for: 4096 bytes for PAGE, one fill byte for ZERO.  CONTINUE means the last block
named on this channel, across sections.  native/stream/ram.c does the same at speed; the error
functions below make the text for both.
"""

from __future__ import annotations

from collections.abc import Mapping

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import MAX_SOURCE_PAGE_BYTES, PAGE_BYTES, RamBlock
from sharded_pc.wire import compressed, events, xbzrle
from sharded_pc.wire import constants as c
from sharded_pc.wire.constants import RamFlag
from sharded_pc.wire.steps import TELL, Parser, Peek, counted_text, number, text

OFFSET_MASK = ~0xFFF
_KIND_MASK = 0xFFF & ~int(RamFlag.CONTINUE)
"""~RamFlag.CONTINUE has no unknown flags: what is masked with it seems to be of a known kind."""


def unsupported(header: int) -> RemoteProtocolError:
    kind = RamFlag(header & _KIND_MASK)
    what = c.UNSUPPORTED_RECORDS.get(kind, f"{kind.name} where only requested pages come")
    return RemoteProtocolError(f"the source sends {what}")


def bad_flags(header: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"RAM record with unknown flags {header & 0xFFF:#x}")


def no_block(header: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"RAM record {header:#x} continues a block, but none was named yet")


def empty_name(header: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"RAM record {header:#x} with an empty block name")


def unknown_block(name: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"RAM record for unknown block {name!r}")


def outside_block(header: int, block: RamBlock) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"RAM record for offset {header & OFFSET_MASK:#x} outside block {block.name!r} "
        f"of {block.size:#x} bytes"
    )


def bad_fill(fill: int, header: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"zero page at offset {header & OFFSET_MASK:#x} with fill byte {fill:#x}, expected 0"
    )


def not_in_postcopy(header: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"{_encoded(header)} in postcopy, where there can be none")


def bad_encoding(encoding: int, header: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"xbzrle page at offset {header & OFFSET_MASK:#x} in encoding {encoding}, "
        f"expected {xbzrle.ENCODING}"
    )


def bad_length(length: int, header: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"{_encoded(header)} of {length} bytes, expected at most {_MOST_ENCODED[_kind(header)]}"
    )


def bad_encoded(length: int, header: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"{_encoded(header)} of {length} bytes does not decode to a page")


def _kind(header: int) -> RamFlag:
    return RamFlag(header & _KIND_MASK)


def _encoded(header: int) -> str:
    return f"{_kind(header).name} record at offset {header & OFFSET_MASK:#x}"


_MOST_ENCODED = {RamFlag.XBZRLE: PAGE_BYTES, RamFlag.COMPRESS_PAGE: compressed.MOST_BYTES}


def before_block_list(header: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"RAM record {header:#x} before the block list")


def second_block_list() -> RemoteProtocolError:
    return RemoteProtocolError("a second block list")


def _refuse(header: int) -> RemoteProtocolError:
    flags = RamFlag(header & _KIND_MASK)
    # Only page-like records may continue a block, and these are none.
    if flags in c.UNSUPPORTED_RECORDS and not header & RamFlag.CONTINUE:
        return unsupported(header)
    return bad_flags(header)


class Channel:
    """One channel's RAM records.  While `blocks` is empty the block list must come first; whoever
    drives the parser fills `blocks` at the RamBlocks event."""

    def __init__(self, blocks: Mapping[str, RamBlock]) -> None:
        self._blocks = blocks
        self._block: RamBlock | None = None
        self.postcopy = False
        """set by the driver from LISTENING on"""

    def records(self, page_sizes: int | None = None) -> Parser:
        """The events of one section's records, through EOS.  `page_sizes`: as first_record()."""
        if not self._blocks:
            yield events.RamBlocks((yield from first_record(page_sizes)))
        while True:
            at = yield TELL
            header = yield from number(8)
            try:
                done = yield from self._record(header)
            except RemoteProtocolError as error:
                error.offset = at if error.offset is None else error.offset
                raise
            if done:
                return

    def _record(self, header: int) -> Parser:
        match header & 0xFFF:
            case RamFlag.EOS:
                return True
            case RamFlag.MEM_SIZE:
                raise second_block_list()
            case RamFlag.MULTIFD_FLUSH:
                yield events.MultifdFlush()
            case flags if flags & _KIND_MASK in (RamFlag.PAGE, RamFlag.ZERO):
                yield from self._page(header)
            case flags if flags & _KIND_MASK == RamFlag.XBZRLE:
                yield from self._xbzrle(header)
            case flags if flags & _KIND_MASK == RamFlag.COMPRESS_PAGE:
                yield from self._compressed(header)
            case _:
                raise _refuse(header)
        return False

    def _xbzrle(self, header: int) -> Parser:
        if self.postcopy:
            raise not_in_postcopy(header)
        block = yield from self._within(header)
        encoding = yield from number(1)
        if encoding != xbzrle.ENCODING:
            raise bad_encoding(encoding, header)
        size = yield from number(2)
        if size > _MOST_ENCODED[RamFlag.XBZRLE]:
            raise bad_length(size, header)
        encoded = bytes((yield size)) if size else b""
        if xbzrle.patched(bytes(PAGE_BYTES), encoded) is None:
            raise bad_encoded(size, header)
        self._block = block
        yield events.RamXbzrle(block.name, header & OFFSET_MASK, encoded)

    def _compressed(self, header: int) -> Parser:
        block = yield from self._within(header)
        size = yield from number(4)
        if size > _MOST_ENCODED[RamFlag.COMPRESS_PAGE]:
            raise bad_length(size, header)
        page = compressed.inflated(bytes((yield size)) if size else b"")
        if page is None:
            raise bad_encoded(size, header)
        self._block = block
        yield events.RamPage(block.name, header & OFFSET_MASK, page)

    def _within(self, header: int) -> Parser:
        """The block of a record for one page of it."""
        block = yield from self._locate(header)
        if header & OFFSET_MASK >= block.size:
            raise outside_block(header, block)
        return block

    def _page(self, header: int) -> Parser:
        block = yield from self._within(header)
        offset = header & OFFSET_MASK
        if header & RamFlag.ZERO:
            fill = yield from number(1)
            if fill:
                raise bad_fill(fill, header)
            self._block = block
            yield events.RamZeroPage(block.name, offset)
        else:
            self._block = block
            yield events.RamPage(block.name, offset, (yield PAGE_BYTES))

    def _locate(self, header: int) -> Parser:
        if header & RamFlag.CONTINUE:
            if self._block is None:
                raise no_block(header)
            return self._block
        size = yield from number(1)
        if size == 0:
            raise empty_name(header)
        name = text((yield size))
        if name not in self._blocks:
            raise unknown_block(name)
        return self._blocks[name]


def first_record(page_sizes: int | None = None) -> Parser:
    """The record that opens the setup section: its blocks.  Errors carry the record's offset.
    `page_sizes`: what POSTCOPY_ADVISE said of the source's RAM, None if it did not come."""
    at = yield TELL
    header = yield from number(8)
    try:
        if header & 0xFFF != RamFlag.MEM_SIZE:
            raise before_block_list(header)
        return (yield from block_list(header & OFFSET_MASK, page_sizes or PAGE_BYTES))
    except RemoteProtocolError as error:
        error.offset = at if error.offset is None else error.offset
        raise


def one_block(page_sizes: int) -> Parser:
    """A block of the list; `page_sizes` as POSTCOPY_ADVISE says."""
    name = yield from counted_text("RAM block list entry")
    if "\0" in name:  # names are C strings to QEMU and to the core
        raise RemoteProtocolError(f"block name {name!r} with a NUL in it")
    size = yield from number(8)
    page = (yield from _source_page(name, page_sizes)) if page_sizes > PAGE_BYTES else PAGE_BYTES
    if size == 0 or size % page:
        raise RemoteProtocolError(
            f"block {name!r} of {size:#x} bytes is not a whole number of {page}-byte pages"
        )
    return RamBlock(name, size, source_page_size=page)


def _source_page(name: str, page_sizes: int) -> Parser:
    """The be64 behind the size of a block whose pages are larger than the host's.  What follows any
    other has more than zeros in its first byte (the length of a name) or in its last 12 bits (the
    flags of a record)."""
    page = int.from_bytes((yield Peek(8)), "big")
    if page >> 56 or page % PAGE_BYTES:
        return PAGE_BYTES
    yield 8
    known = PAGE_BYTES < page <= MAX_SOURCE_PAGE_BYTES and page & (page - 1) == 0
    if not known or not page & page_sizes:
        raise RemoteProtocolError(
            f"block {name!r} with pages of {page:#x} bytes, expected one of {page_sizes:#x}"
        )
    return page


def block_list(total: int, page_sizes: int = PAGE_BYTES) -> Parser:
    """The blocks behind a MEM_SIZE record whose sizes sum to `total` bytes."""
    if not 0 < total <= c.MAX_RAM_BYTES:
        raise RemoteProtocolError(f"RAM of {total:#x} bytes, expected 1..{c.MAX_RAM_BYTES:#x}")
    blocks: dict[str, RamBlock] = {}
    left = total
    while left > 0:
        block = yield from one_block(page_sizes)
        if block.name in blocks:
            raise RemoteProtocolError(f"block {block.name!r} stands twice in the block list")
        if len(blocks) == c.MAX_BLOCKS:
            raise RemoteProtocolError(f"more than {c.MAX_BLOCKS} RAM blocks")
        if block.size > left:
            raise RemoteProtocolError(
                f"block {block.name!r} of {block.size:#x} bytes exceeds the {left:#x} bytes "
                f"that the block list has left"
            )
        blocks[block.name] = block
        left -= block.size
    return tuple(blocks.values())
