"""Records on postcopy-preempt's channel: with either placement the C core makes of them what the
reference makes; what was there first stays."""

from __future__ import annotations

import atexit
import functools

from tests import wire_twins
from tests.fuzz.pieces import cut
from tests.fuzz.targets import ram_records

BLOCKS, TOKENS = ram_records.BLOCKS, ram_records.TOKENS


@functools.cache
def _readers() -> tuple:
    """The C core's memory, used again and again."""
    out = []
    for reader in (wire_twins.Preempt, wire_twins.PreemptStraight):
        out.append(reader(BLOCKS))
        atexit.register(out[-1].__exit__)
    return tuple(out)


def one_input(data: bytes) -> None:
    with wire_twins.ReferencePostcopy(BLOCKS) as reference:
        want = reference.run(cut(data))
    for reader in _readers():
        seen = reader.run(cut(data))
        seen.eaten = want.eaten
        assert seen == want, type(reader).__name__
