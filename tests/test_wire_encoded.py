"""Encoded pages: one table on the Python reference and the C core, however bytes arrive."""

from __future__ import annotations

import itertools
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.wire import writer as w
from sharded_pc.wire import xbzrle
from sharded_pc.wire.compressed import deflated
from sharded_pc.wire.feed import read_stream
from tests import wire_cases as cases
from tests import wire_twins as twins
from tests.test_wire_ram import READERS, check, named
from tests.wire_cases import BLOCKS, EOS, Case, Record, data, header, page, zero

PRECOPY = {
    "reference": twins.Reference,
    "C, copy": twins.Precopy,
    "C, continue": twins.Straight,
}
POSTCOPY = {
    "C, copy": twins.Postcopy,
    "C, continue": twins.StraightPostcopy,
}
CUTS = {"whole": cases.whole, "split": cases.split, "by byte": cases.by_byte}
ZEROS = bytes(PAGE_BYTES)


def delta(block: str | None, number: int, encoded: bytes, encoding: int = 1) -> Record:
    return Record(w.xbzrle_page(block, number * PAGE_BYTES, encoded, encoding), block, number)


def sparse(seed: int, base: bytes = ZEROS) -> bytes:
    """A page that differs from `base` in some bytes, the first and the last among them."""
    rng, out = random.Random(seed), bytearray(base)
    for at in (0, PAGE_BYTES - 1, *(rng.randrange(PAGE_BYTES) for _ in range(40))):
        out[at] ^= rng.randrange(1, 256)
    return bytes(out)


FIVE = data(5)
GOOD = {
    "on a page": ((page("pc.ram", 5), delta(None, 5, xbzrle.difference(FIVE, sparse(1, FIVE)))),
                  {("pc.ram", 5): sparse(1, FIVE)}),
    "twice": ((page("pc.ram", 5), delta(None, 5, xbzrle.difference(FIVE, sparse(1, FIVE))),
               delta(None, 5, xbzrle.difference(sparse(1, FIVE), sparse(2, FIVE)))),
              {("pc.ram", 5): sparse(2, FIVE)}),
    "on zeros": ((zero("pc.ram", 5), delta(None, 5, xbzrle.difference(ZEROS, sparse(3)))),
                 {("pc.ram", 5): sparse(3)}),
    "on what never came": ((delta("pc.ram", 9, xbzrle.difference(ZEROS, sparse(3))),),
                           {("pc.ram", 9): sparse(3)}),
    "data, zeros, then": ((page("pc.ram", 5), zero(None, 5),
                           delta(None, 5, xbzrle.difference(ZEROS, sparse(4)))),
                          {("pc.ram", 5): sparse(4)}),
    "as long as a page": ((page("pc.ram", 5), delta(None, 5, b"\0\xfd\x1f" + data(6)[:4093])),
                       {("pc.ram", 5): data(6)[:4093] + FIVE[-3:]}),
    "nothing": ((page("pc.ram", 5), delta(None, 5, b"")), {("pc.ram", 5): FIVE}),
    "another block between pages": (
        (page("pc.ram", 5), page(None, 6), delta(cases.ROM.name, 1, b"\1\1x"), page("pc.ram", 7)),
        {("pc.ram", 5): FIVE, ("pc.ram", 6): data(6), ("pc.ram", 7): data(7),
         (cases.ROM.name, 1): b"\0x" + ZEROS[2:]}),
    "pages behind it": ((page("pc.ram", 5), delta(None, 5, b"\0\1x"), page(None, 6), zero(None, 7)),
                        {("pc.ram", 5): b"x" + FIVE[1:], ("pc.ram", 6): data(6),
                         ("pc.ram", 7): None}),
}  # fmt: skip

RUBBISH = {
    "one byte": b"\1",
    "no replaced bytes": b"\1\0",
    "an empty run in the middle": b"\0\1x\0\1y",
    "a length of three bytes": b"\x80\x80\1\1x",
    "a byte too few": b"\0\3xy",
    "beyond the page": b"\xff\x1f\2xy",
    "the first run beyond the page": b"\x80\x20\1x",
    "far beyond the page": b"\xff\x7f\xff\x7fx",
    "a length at the end": b"\0\1x\5",
}
BAD = {
    **{f"rubbish, {name}": (delta("pc.ram", 3, raw), f"of {len(raw)} bytes does not decode")
       for name, raw in RUBBISH.items()},
    "encoding 2": (delta("pc.ram", 3, b"", 2), "page at offset 0x3000 in encoding 2, expected 1"),
    "too long": (delta("pc.ram", 3, bytes(4097)), "XBZRLE record at offset 0x3000 of 4097 bytes"),
    "outside": (delta("pc.ram", 130, b""), "RAM record for offset 0x82000 outside block 'pc.ram'"),
    "no block": (header(0x60, 0x1000), "RAM record 0x1060 continues a block, but none"),
    "an unknown block": (delta("pc.no", 1, b""), "unknown block 'pc.no'"),
}  # fmt: skip


def seen_of(records: tuple[Record, ...], pages: dict, sections: list[int]) -> twins.Seen:
    image = twins.Image(BLOCKS, first_wins=False)
    for (block, number), content in pages.items():
        image.put(block, number, content)
    seen = image.seen(sections)
    kinds = [int.from_bytes(record.raw[:8], "big") for record in records]
    seen.normal = sum(kind & 0x8 > 0 for kind in kinds)
    seen.duplicate = sum(kind & 0x2 > 0 for kind in kinds)
    return seen


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("reader", PRECOPY.values(), ids=PRECOPY)
@pytest.mark.parametrize("name", GOOD)
def test_a_difference(name, reader, cut):
    records, pages = GOOD[name]
    case = Case(name, (*records, EOS))
    want = seen_of(records, pages, [len(case.stream)])
    with reader(BLOCKS) as under_test:
        for pieces in itertools.islice(cut(case), 0, None, 7):
            seen = under_test.run(pieces)
            seen.eaten = 0
            assert seen == want


@pytest.mark.parametrize("name", BAD)
def test_refused_alike_and_as_early(name):
    record, error = BAD[name]
    case, found = Case(name, (EOS, record)), []
    for reader in PRECOPY.values():
        with reader(BLOCKS) as under_test:
            (pieces,) = cases.by_byte(case)
            found.append(under_test.run(pieces))
            assert error in found[-1].error and found[-1].at == len(EOS.raw)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("reader", POSTCOPY.values(), ids=POSTCOPY)
def test_there_is_none_in_postcopy(reader):
    stream = page("pc.ram", 5).raw + delta(None, 5, b"\0\1x").raw
    with reader(BLOCKS) as under_test:
        seen = under_test.run([stream])
    assert seen.error == "XBZRLE record at offset 0x5000 in postcopy, where there can be none"
    assert seen.memory["pc.ram"][5 * PAGE_BYTES : 6 * PAGE_BYTES] == FIVE


def packed(block: str | None, number: int, content: int, level: int = 1) -> Record:
    raw = w.compressed_page(block, number * PAGE_BYTES, deflated(data(content), level))
    return Record(raw, block, number, content)


def zlib_bytes(raw: bytes) -> Record:
    return Record(w.compressed_page("pc.ram", 0x3000, raw), "pc.ram", 3)


COMPRESSED = (
    Case("one", (packed("pc.ram", 5, 5), EOS)),
    Case("stored, as long as it can be", (packed("pc.ram", 5, 5, 0), EOS)),
    Case("among others", (page("pc.ram", 5), packed(None, 6, 6), zero(None, 7), packed(None, 8, 8),
                          page(None, 9), EOS)),
    Case("over a stripe's edge", (packed("pc.ram", 62, 1),
                                  *(packed(None, n, n) for n in range(63, 67)), EOS)),
    Case("twice", (packed("pc.ram", 5, 1), packed(None, 5, 2), page(None, 5, 3), EOS)),
    Case("data, then twice", (page("pc.ram", 5, 1), packed(None, 5, 2), zero(None, 5), EOS)),
    Case("several blocks", (packed("pc.ram", 5, 1), packed(cases.ROM.name, 1, 2), page(None, 0),
                            EOS)),
)  # fmt: skip
NOT_A_PAGE = {
    "nothing": b"",
    "rubbish": b"rubbish",
    "cut": deflated(data(1))[:-1],
    "a byte too many": deflated(bytes(PAGE_BYTES)) + b"x",
    "less than a page": zlib.compress(bytes(PAGE_BYTES - 1)),
    "more than a page": zlib.compress(bytes(PAGE_BYTES + 1)),
    "a bomb": zlib.compress(bytes(1 << 20)),
}
NOT_COMPRESSED = (
    *(Case(name, (EOS, zlib_bytes(raw)), error=
           f"COMPRESS_PAGE record at offset 0x3000 of {len(raw)} bytes does not decode to a page")
      for name, raw in NOT_A_PAGE.items()),
    Case("too long", (EOS, zlib_bytes(bytes(4111))), error=
         "COMPRESS_PAGE record at offset 0x3000 of 4111 bytes, expected at most 4110"),
    Case("no block", (EOS, header(0x120, 0x1000)), error=
         "RAM record 0x1120 continues a block, but none was named yet"),
    Case("outside", (EOS, packed("pc.ram", 130, 1)), error=
         "RAM record for offset 0x82000 outside block 'pc.ram' of 0x82000 bytes"),
)  # fmt: skip


def some(cut: cases.Cut) -> cases.Cut:
    return lambda case: itertools.islice(cut(case), 0, None, 7)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("case", named((*COMPRESSED, *NOT_COMPRESSED)))
def test_a_compressed_page(case, reader, cut):
    check(reader, case, some(cut))


@pytest.mark.parametrize("case", named(COMPRESSED))
def test_compressed_pages_a_guest_waits_for(case):
    check(twins.Awaited, case, some(cases.split))


def test_there_is_none_behind_a_package():
    stream = w.header() + w.configuration("pc") + w.ram_setup(BLOCKS) + w.packaged(b"")
    record = delta("pc.ram", 5, b"\0\1x").raw
    with pytest.raises(RemoteProtocolError, match="in postcopy, where there can be none"):
        read_stream().feed(stream + w.ram_section(record))


@given(st.binary(max_size=80), st.lists(st.tuples(st.integers(0, 4095), st.binary(max_size=200))))
def test_what_is_told_is_found(seed, changes):
    before = (seed * PAGE_BYTES)[:PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
    after = bytearray(before)
    for at, new in changes:
        after[at : at + len(new)] = new[: PAGE_BYTES - at]
    assert xbzrle.patched(before, xbzrle.difference(before, bytes(after))) == after
