"""RAM records: with either placement the C core makes of them what the reference makes."""

from __future__ import annotations

import atexit
import functools

from sharded_pc.wire import writer
from sharded_pc.wire.compressed import deflated
from tests import wire_cases, wire_twins
from tests.fuzz.pieces import cut
from tests.wire_cases import RAM, ROM

BLOCKS = (RAM, ROM)
TOKENS = (
    wire_cases.EOS.raw,
    *(wire_cases.page(name, 1).raw for name in (None, *(block.name for block in BLOCKS))),
    *(wire_cases.page(None, number).raw for number in (2, 3, 63, 64, 129, 130)),
    *(wire_cases.zero(name, 1).raw for name in (None, *(block.name for block in BLOCKS))),
    *(wire_cases.zero(None, number).raw for number in (1, 2, 64, 129, 130)),
    *(writer.xbzrle_page(None, 4096 * n, b"\0\2ab\x90\x03\1c") for n in (1, 2, 64)),
    writer.xbzrle_page("pc.ram", 4096, b"\5\1x"),
    *(writer.compressed_page(name, 8192, deflated(bytes(4096))) for name in (None, "pc.ram")),
)


@functools.cache
def _readers() -> tuple:
    """The C core's memory, used again and again."""
    out = []
    for reader in (wire_twins.Precopy, wire_twins.Straight):
        out.append(reader(BLOCKS))
        atexit.register(out[-1].__exit__)
    return tuple(out)


def one_input(data: bytes) -> None:
    with wire_twins.Reference(BLOCKS) as reference:
        want = reference.run(cut(data))
    for reader in _readers():
        seen = reader.run(cut(data))
        seen.eaten = want.eaten
        assert seen == want, type(reader).__name__
