"""Discard messages that the C core takes in one go leave what Python would have left; of what is
wrong with one, the same is said."""

from __future__ import annotations

import random

import pytest

from sharded_pc.geometry import PAGE_BYTES, Placement, RamBlock
from sharded_pc.native.control import ShardCounters
from sharded_pc.native.ram import Ram
from sharded_pc.wire import writer as w
from sharded_pc.wire.constants import Cmd
from tests.qemu import wait_until
from tests.synthetic import LoneReceiver

pytestmark = pytest.mark.uffd

BLOCKS = (RamBlock("pc.ram", 3000 * PAGE_BYTES), RamBlock("a" * 255, 40 * PAGE_BYTES))
ADVISED = b"".join([
    w.header(), w.configuration("synthetic"), w.open_return_path(), w.postcopy_advise(),
    w.ram_setup(BLOCKS),
    *(w.ram_section(b"".join(w.zero_page(b.name, n * PAGE_BYTES) for n in range(b.pages)))
      for b in BLOCKS),
])  # fmt: skip
ENDINGS = {
    "nothing": b"",
    "a PING": w.ping(7) + w.discard("pc.ram", [(0, PAGE_BYTES)]),
    "outside": w.discard("pc.ram", [(0, PAGE_BYTES), (2999 * PAGE_BYTES, 2 * PAGE_BYTES)]),
    "around the end": w.discard("pc.ram", [(0, PAGE_BYTES), (2**64 - PAGE_BYTES, 2 * PAGE_BYTES)]),
    "half a page": w.discard("pc.ram", [(PAGE_BYTES, PAGE_BYTES), (512, PAGE_BYTES)]),
    "no page": w.discard("pc.ram", [(PAGE_BYTES, PAGE_BYTES), (0, 0)]),
    "unknown block": w.discard("pc.rom", [(0, PAGE_BYTES)]),
    "no name": w.command(Cmd.POSTCOPY_RAM_DISCARD, bytes(24)),
    "too short": w.command(Cmd.POSTCOPY_RAM_DISCARD, b"\0\1a\0"),
    "cut": w.discard("pc.ram", [(0, PAGE_BYTES)])[:-1],
    "an unknown command": w.command(99, bytes(40)),
    "another section": w.eof(),
}


def discards(seed: int) -> bytes:
    """Some hundred messages of 1..12 ranges, in both blocks."""
    dice = random.Random(seed)

    def one() -> bytes:
        block = dice.choice(BLOCKS)
        starts = [dice.randrange(block.pages) for _ in range(dice.randint(1, 12))]
        ends = [dice.randint(n + 1, min(n + 5, block.pages)) for n in starts]
        pairs = zip(starts, ends, strict=True)
        return w.discard(block.name, [(s * PAGE_BYTES, (e - s) * PAGE_BYTES) for s, e in pairs])

    return b"".join(one() for _ in range(300))


def settled(shard: ShardCounters) -> bool:
    return shard.discards_done == shard.discards_sent


def outcome(name: str, stream: bytes, placement: Placement) -> dict:
    """What is left, and what was said of the end."""
    receiver = LoneReceiver(name, 2, placement)
    try:
        error = receiver.run(stream)
        memory = receiver.memory
        wait_until(lambda: all(settled(each) for each in memory.control.shards()), "discards", 10)
        return {
            "error": (type(error), str(error)),
            "received": [memory.received.test(n) for n in range(memory.received.bits)],
            "discarded": memory.control.totals.discarded,
        }
    finally:
        receiver.close()


@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("ending", ENDINGS)
def test_with_and_without(new_name, monkeypatch, ending, placement):
    stream = ADVISED + discards(len(ending)) + ENDINGS[ending]
    taken: list[int] = []
    ahead = Ram.discards_ahead

    def counted(ram: Ram) -> None:
        before = ram._keep[0].offset
        ahead(ram)
        taken.append(ram._keep[0].offset - before)

    monkeypatch.setattr(Ram, "discards_ahead", counted)
    quick = outcome(new_name(), stream, placement)
    monkeypatch.setattr(Ram, "discards_ahead", lambda ram: None)
    assert quick == outcome(new_name(), stream, placement)
    assert quick["discarded"] > 300
    assert sum(taken) > 10_000  # of some 40 kB
