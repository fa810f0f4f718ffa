"""Cases for RAM records, as data: run on the Python reference and on the C core (test_wire_ram.py).

A good case is the records of one or more sections, each through EOS.  A bad one ends with a record
that must be refused, with the text a user reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.wire import constants as c
from sharded_pc.wire import writer
from sharded_pc.wire.constants import RamFlag

LONG = "long/" + "x" * 250
ODD = "\udcff\x01 %"
RAM = RamBlock("pc.ram", 130 * PAGE_BYTES)
"""Three stripes of 64 pages, the last one of two pages."""
ROM = RamBlock("/rom@etc/acpi/tables", 2 * PAGE_BYTES)
BLOCKS = (RAM, ROM, RamBlock(LONG, PAGE_BYTES), RamBlock(ODD, PAGE_BYTES))

BIG = (RamBlock("pc.ram", 1024 * PAGE_BYTES), RamBlock("vga.vram", 70 * PAGE_BYTES))


class Record(NamedTuple):
    """Bytes, and what a receiver must make of them."""

    raw: bytes
    block: str | None = None
    """as written: None goes on with the last one"""
    page: int | None = None
    content: int | None = None
    """of data(); None: zeros"""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A stream and what becomes of it."""

    name: str
    records: tuple[Record, ...]
    blocks: tuple[RamBlock, ...] = BLOCKS
    error: str | None = None
    """why the last record is refused"""

    @property
    def stream(self) -> bytes:
        return b"".join(record.raw for record in self.records)

    @property
    def edges(self) -> list[int]:
        """Offsets of the records, and of the end."""
        return list(itertools.accumulate((len(r.raw) for r in self.records), initial=0))

    def pages(self) -> Iterator[tuple[str, int, bytes | None]]:
        """(block, page, data or None for zeros) of every good record, in order."""
        last = ""
        for record in self.records[:-1] if self.error else self.records:
            if record.page is not None:
                last = record.block or last
                yield last, record.page, None if record.content is None else data(record.content)


def data(number: int) -> bytes:
    """A page that no other number gives."""
    return random.Random(number).randbytes(PAGE_BYTES)


def page(block: str | None, number: int, content: int | None = None) -> Record:
    content = number if content is None else content
    raw = writer.page(block, number * PAGE_BYTES, data(content))
    return Record(raw, block, number, content)


def zero(block: str | None, number: int, fill: int = 0) -> Record:
    return Record(writer.zero_page(block, number * PAGE_BYTES, fill), block, number)


def header(flags: int, offset: int = 0) -> Record:
    return Record((offset | flags).to_bytes(8, "big"))


EOS = Record(writer.eos())


def _good(name: str, *records: Record, blocks=BLOCKS) -> Case:
    return Case(name, records, blocks)


def _bad(name: str, error: str, *records: Record) -> Case:
    """`records`: all but the last are good."""
    return Case(name, records, BLOCKS, error)


_SEQUENTIAL = [page("pc.ram", 62), *(page(None, n) for n in range(63, 67))]
_RAM_AND_ROM = [page("pc.ram", 0), page(ROM.name, 0), page(None, 1), page("pc.ram", 2)]

GOOD = (
    _good("EOS only", EOS),
    _good("two empty sections", EOS, EOS),
    _good("one page", page("pc.ram", 3), EOS),
    _good("one zero page", zero("pc.ram", 3), EOS),
    _good("the first and the last page", page("pc.ram", 0), page(None, 129), EOS),
    _good("neighbours across a stripe", *_SEQUENTIAL, EOS),
    _good(
        "zeros across a stripe", zero("pc.ram", 62), *(zero(None, n) for n in range(63, 67)), EOS
    ),
    _good("several blocks and back", *_RAM_AND_ROM, EOS),
    _good("a block of one page, named by 255 bytes", page(LONG, 0), zero("pc.ram", 1), EOS),
    _good("a name that is no UTF-8", zero(ODD, 0), page(None, 0), EOS),
    _good(
        "CONTINUE across sections", page("pc.ram", 7), EOS, page(None, 8), EOS, zero(None, 9), EOS
    ),
    _good("the same page twice", page("pc.ram", 5, 1), page(None, 5, 2), EOS),
    _good("data, then zeros", page("pc.ram", 5), zero(None, 5), EOS),
    _good("zeros, then data", zero("pc.ram", 5), page(None, 5), EOS),
    _good("zeros twice", zero("pc.ram", 5), zero(None, 5), EOS),
    _good("downwards", page("pc.ram", 6), page(None, 5), page(None, 4), EOS),
    _good("zeros between pages", page("pc.ram", 5), zero(None, 6), page(None, 7), EOS),
    _good("a page named again", page("pc.ram", 5), page("pc.ram", 6), EOS),
    _good("a page behind a gap", page("pc.ram", 5), page(None, 7), EOS),
)

_UNSUPPORTED = {
    RamFlag.FULL: "an obsolete 'full' record",
    RamFlag.HOOK: "an RDMA record (migrate over tcp: or unix:)",
}
assert _UNSUPPORTED.keys() == c.UNSUPPORTED_RECORDS.keys()

_BAD_FLAGS = (
    0x000,
    0x020,  # CONTINUE of nothing
    0x00A,  # a page of data and of zeros
    0x030,  # CONTINUE | EOS
    0x024,  # CONTINUE | MEM_SIZE
    0x021,  # CONTINUE of records that name no block
    0x0A0,
    0x220,
    0x018,  # PAGE | EOS
    0x00C,
    0x400,
    0x800,
    0x808,  # a page, and something unknown
    0x402,
    0x828,
    0x900,
    0x440,
    0xFFF,
)


def _unsupported() -> Iterator[Case]:
    for flag, what in _UNSUPPORTED.items():
        yield _bad(f"unsupported {flag.name}", f"the source sends {what}", header(flag, 0x3000))


def _bad_flags() -> Iterator[Case]:
    for flags in _BAD_FLAGS:
        error = f"RAM record with unknown flags {flags:#x}"
        yield _bad(f"flags {flags:#05x}", error, zero("pc.ram", 1), header(flags, 0x1000))
    yield _bad("bad flags behind a page", "RAM record with unknown flags 0x30",
               page("pc.ram", 1), page(None, 2), header(0x30))  # fmt: skip


def _no_block() -> Iterator[Case]:
    for flags, value in ((RamFlag.PAGE, 0x2028), (RamFlag.ZERO, 0x2022)):
        error = f"RAM record {value:#x} continues a block, but none was named yet"
        yield _bad(f"CONTINUE of no block, {flags.name}", error, EOS, header(value))


def _names() -> Iterator[Case]:
    for write in (page, zero):
        kind = "page" if write is page else "zero page"
        value = 0x1008 if write is page else 0x1002
        yield _bad(f"empty name, {kind}", f"RAM record {value:#x} with an empty block name",
                   EOS, write("", 1))  # fmt: skip
        for name in ("pc.rom", "pc.ra", "pc.ram\0", "a\0b", LONG[:-1] + "y", "\udcfe"):
            yield _bad(f"unknown block {name[-8:]!r}, {kind}",
                       f"RAM record for unknown block {name!r}",
                       write("pc.ram", 1), write(name, 1))  # fmt: skip


def _outside() -> Iterator[Case]:
    places = (
        (RAM.size, "at the end"),
        (RAM.size + (1 << 30), "beyond"),
        ((1 << 64) - 4096, "last"),
    )
    for offset, where in places:
        error = f"RAM record for offset {offset:#x} outside block 'pc.ram' of 0x82000 bytes"
        number = offset // PAGE_BYTES
        for write in (page, zero):
            kind = "page" if write is page else "zero page"
            yield _bad(f"{where}, {kind}", error, zero(ROM.name, 1), write("pc.ram", number))
            yield _bad(f"{where}, {kind} that goes on", error,
                       write("pc.ram", 129), write(None, number))  # fmt: skip


def _others() -> Iterator[Case]:
    yield _bad("bad fill", "zero page at offset 0x3000 with fill byte 0xff, expected 0",
               page("pc.ram", 2), zero("pc.ram", 3, 0xFF))  # fmt: skip
    yield _bad("bad fill that goes on", "zero page at offset 0x3000 with fill byte 0x1, expected 0",
               zero("pc.ram", 2), zero(None, 3, 1))  # fmt: skip
    yield _bad("a second block list", "a second block list",
               page("pc.ram", 2), header(RamFlag.MEM_SIZE, RAM.size))  # fmt: skip


BAD = tuple(
    case
    for cases in (_unsupported, _bad_flags, _no_block, _names, _outside, _others)
    for case in cases()
)


def _walk(rng: random.Random) -> Iterator[tuple[str, int, bool]]:
    """(block, page, zero?): runs and jumps, so that bets on the next page are often lost."""
    pages = {block.name: block.pages for block in BIG}
    while True:
        name = rng.choices(list(pages), (9, 1))[0]
        at = rng.randrange(pages[name])
        zeros = rng.random() < 0.2
        for number in range(at, min(at + rng.choice((1, 1, 2, 5, 40, 150)), pages[name])):
            yield name, number, zeros != (rng.random() < 0.03)


def big(seed: int, pages: int) -> Case:
    """Sections of `pages` records: more than a shard's tmp pages, jumps between shards."""
    rng = random.Random(seed)
    out: list[Record] = []
    last = None
    for count, (name, number, zeros) in zip(range(pages), _walk(rng), strict=False):
        named = name if name != last or rng.random() < 0.02 else None
        out.append(zero(named, number) if zeros else page(named, number, count))
        last = name
        if rng.random() < 0.01:
            out.append(EOS)
    return _good(f"{pages} pages, seed {seed}", *out, EOS, blocks=BIG)


def around(case: Case, reach: int = 12, samples: int = 9) -> list[int]:
    """Offsets to cut at: all of a short case; else those near a record's edge and a sample."""
    size = len(case.stream)
    if size < 700:
        return list(range(1, size))
    near = {edge + by for edge in case.edges for by in range(-reach, reach + 1)}
    near |= {size * k // samples for k in range(samples)}
    return sorted(at for at in near if 0 < at < size)


Cut = Callable[[Case], Iterator[list[bytes]]]


def whole(case: Case) -> Iterator[list[bytes]]:
    yield [case.stream]


def split(case: Case, *, everywhere: bool = False) -> Iterator[list[bytes]]:
    stream = case.stream
    for at in range(1, len(stream)) if everywhere else around(case):
        yield [stream[:at], stream[at:]]


def by_byte(case: Case) -> Iterator[list[bytes]]:
    stream = case.stream
    yield [stream[i : i + 1] for i in range(len(stream))]


def crumbs(case: Case, seed: int = 7) -> Iterator[list[bytes]]:
    """Pieces of all sizes, for cases too long for the others."""
    rng, at, pieces, stream = random.Random(seed), 0, [], case.stream
    while at < len(stream):
        size = rng.choice((1, 3, 7, 8, 9, 100, 4095, 4096, 4104, 4105, 9000, 30000))
        pieces.append(stream[at : at + size])
        at += size
    yield pieces
