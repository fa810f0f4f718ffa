"""The ring and the bitmap that lie in shared memory, against a deque and a set."""

from __future__ import annotations

import collections

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sharded_pc.native.control import Bitmap
from sharded_pc.native.core import ensure_object, ffi, lib

BITS = 64 * 4
SETTINGS = settings(max_examples=40, stateful_step_count=40, deadline=None)


class Ring(RuleBasedStateMachine):
    """One producer and one consumer in turn; bursts reach a full and an empty ring."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = ensure_object(lib.sp_ring_new(), "a ring")
        self.model: collections.deque[tuple] = collections.deque()
        self.count = 0

    def teardown(self) -> None:
        lib.sp_ring_free(self.ring)

    @rule(n=st.integers(1, 700), kind=st.integers(1, 4))
    def push(self, n: int, kind: int) -> None:
        for _ in range(n):
            self.count += 1
            fields = (self.count, self.count * 7, (1 << 64) - self.count, self.count, kind)
            room = len(self.model) < lib.SP_RING_SLOTS
            assert lib.sp_ring_push_one(self.ring, ffi.new("sp_desc *", fields)) == room
            if room:
                self.model.append(fields)

    @rule(n=st.integers(1, 700))
    def take(self, n: int) -> None:
        out = ffi.new("sp_desc *")
        for _ in range(n):
            assert lib.sp_ring_take_one(self.ring, out) == bool(self.model)
            if self.model:
                got = (out.first_page, out.pages, out.slot, out.block, out.kind)
                assert got == self.model.popleft()


class Bits(RuleBasedStateMachine):
    """Ranges of a bitmap that stands somewhere in a buffer; what is around it stays."""

    ranges = st.tuples(st.integers(0, BITS), st.integers(0, BITS)).map(
        lambda pair: (min(pair), max(pair) - min(pair))
    )
    bits = st.integers(0, BITS - 1)

    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(b"\xa5" * (BITS // 8 + 16))
        self.buffer[8:-8] = bytes(BITS // 8)
        self.map = Bitmap(self.buffer, 8, BITS // 8)
        self.model: set[int] = set()

    def teardown(self) -> None:
        self.map.release()

    @rule(where=ranges)
    def set(self, where: tuple[int, int]) -> None:
        first, count = where
        self.map.set(first, count)
        self.model.update(range(first, first + count))

    @rule(where=ranges)
    def clear(self, where: tuple[int, int]) -> None:
        first, count = where
        gone = self.model & set(range(first, first + count))
        assert self.map.clear(first, count) == len(gone)
        self.model -= gone

    @rule(bit=bits)
    def claim(self, bit: int) -> None:
        assert self.map.claim(bit) == (bit not in self.model)
        self.model.add(bit)

    @rule(bit=bits)
    def test(self, bit: int) -> None:
        assert self.map.test(bit) == (bit in self.model)

    @rule(where=ranges)
    def count(self, where: tuple[int, int]) -> None:
        first, count = where
        inside = range(first, first + count)
        assert self.map.count(first, count) == len(self.model.intersection(inside))

    @rule(where=ranges)
    def run(self, where: tuple[int, int]) -> None:
        first, count = where
        if count:
            alike = 0
            while alike < count and (first + alike in self.model) == (first in self.model):
                alike += 1
            assert self.map.run(first, count) == alike

    @invariant()
    def bits_are_the_models(self) -> None:
        raw = int.from_bytes(self.buffer[8:-8], "little")
        assert {bit for bit in range(BITS) if raw >> bit & 1} == self.model
        assert self.buffer[:8] == self.buffer[-8:] == b"\xa5" * 8


TestRing = Ring.TestCase
TestRing.settings = SETTINGS
TestBits = Bits.TestCase
TestBits.settings = SETTINGS


@pytest.mark.parametrize("method", ["set", "clear", "count", "run"])
@pytest.mark.parametrize("where", [(-1, 1), (0, 65), (64, 1), (65, 0)])
def test_range_outside(method: str, where: tuple[int, int]) -> None:
    bitmap = Bitmap(bytearray(8), 0, 8)
    with pytest.raises(IndexError, match="of a bitmap of 64"):
        getattr(bitmap, method)(*where)
    bitmap.release()


@pytest.mark.parametrize("method", ["test", "claim"])
@pytest.mark.parametrize("bit", [-1, 64])
def test_bit_outside(method: str, bit: int) -> None:
    bitmap = Bitmap(bytearray(8), 0, 8)
    with pytest.raises(IndexError, match="of a bitmap of 64"):
        getattr(bitmap, method)(bit)
    bitmap.release()
