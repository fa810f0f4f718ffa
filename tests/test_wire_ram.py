"""RAM records: one table of cases on the Python reference and the C core, however bytes arrive."""

from __future__ import annotations

import os

import pytest

from tests import wire_cases as cases
from tests import wire_twins as twins
from tests.wire_cases import Case


class ReferencePostcopy(twins.Reference):
    first_wins = True


READERS = {
    "reference": twins.Reference,
    "C, precopy": twins.Precopy,
    "C, postcopy": twins.Postcopy,
    "C, continue, precopy": twins.Straight,
    "C, continue, postcopy": twins.StraightPostcopy,
    "C, preempt": twins.Preempt,
    "C, continue, preempt": twins.PreemptStraight,
}
CUTS = {"whole": cases.whole, "split": cases.split, "by byte": cases.by_byte}
BIG = (cases.big(1, 1500), cases.big(2, 500), cases.big(3, 500))


def expected(case: Case, *, first_wins: bool) -> twins.Seen:
    """What the table says, no reader involved."""
    image = twins.Image(case.blocks, first_wins=first_wins)
    for page in case.pages():
        image.put(*page)
    ends = zip(case.records, case.edges[1:], strict=True)
    seen = image.seen([end for record, end in ends if record == cases.EOS])
    if case.error:
        seen.error, seen.at = case.error, case.edges[-2]
    return seen


def check(reader, case: Case, cut: cases.Cut) -> None:
    want = expected(case, first_wins=reader.first_wins)
    with reader(case.blocks) as under_test:
        for pieces in cut(case):
            seen = under_test.run(pieces)
            seen.eaten = 0
            assert seen == want, [len(piece) for piece in pieces[:3]]


def named(table) -> list:
    return [pytest.param(case, id=case.name) for case in table]


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("case", named((*cases.GOOD, *cases.BAD)))
def test_record(case: Case, reader, cut) -> None:
    check(reader, case, cut)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_split_inside_a_page(reader) -> None:
    """The table's splits take a sample of a page's bytes: once, every one of them."""
    case = next(case for case in cases.GOOD if case.name == "one page")
    check(reader, case, lambda case: cases.split(case, everywhere=True))


@pytest.mark.parametrize("case", named(cases.GOOD))
def test_pages_a_guest_waits_for(case: Case) -> None:
    """Each page stands in the urgent ring and in the background ring: it is placed once."""
    check(twins.Awaited, case, cases.split)


@pytest.mark.parametrize("cut", [cases.whole, cases.crumbs], ids=lambda c: c.__name__)
@pytest.mark.parametrize("reader", [*READERS.values(), twins.Awaited], ids=lambda r: r.__name__)
@pytest.mark.parametrize("case", named(BIG))
def test_long_sections(case: Case, reader, cut) -> None:
    """More pages than a shard has tmp pages, over stripes and blocks, in runs and in jumps."""
    check(reader, case, cut)


@pytest.mark.parametrize("case", named(cases.BAD))
def test_refused_as_early(case: Case) -> None:
    """The core says no at the same byte as the reference: no byte more is waited for."""
    (pieces,) = cases.by_byte(case)
    eaten = {}
    for reader in READERS.values():
        with reader(case.blocks) as under_test:
            eaten[reader.__name__] = under_test.run(pieces).eaten
    assert len(set(eaten.values())) == 1, eaten


def test_long_case_is_what_it_says() -> None:
    """The big cases lose bets and go round the pool of tmp pages."""
    case = BIG[0]
    with twins.Postcopy(case.blocks) as core:
        core.run([case.stream])
        totals, shards = core.control.totals, core.control.shards()
    assert totals.spills > 10
    assert totals.normal > 2 * twins.SHARDS * twins.POOL_SLOTS
    assert min(shard.pages for shard in shards) > 100


@pytest.mark.parametrize("kind", ["page", "zero page"])
def test_what_a_punch_left_is_overwritten_by_the_preempt_channel(kind: str) -> None:
    """Nobody may look at such a page before; one that stands there for another reason is kept."""
    name = {"page": "one page", "zero page": "one zero page"}[kind]
    case = next(case for case in cases.GOOD if case.name == name)
    ((block, page, data),) = case.pages()
    index = [each.name for each in case.blocks].index(block)
    for left in (True, False):
        with twins.Preempt(case.blocks) as core:
            os.pwrite(core._fds[index], b"\xee" * 4096, page * 4096)
            bit = core.control.block(index)[2] + page
            if left:
                core.written.set(bit, 1)
            seen = core.run([case.stream])
            assert not core.written.test(bit)
        there = seen.memory[block][page * 4096 : page * 4096 + 4096]
        assert there == ((data or bytes(4096)) if left else b"\xee" * 4096)
        assert seen.received[block] == [page]
