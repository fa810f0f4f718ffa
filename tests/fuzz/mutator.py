"""Changes inputs at random: the same changes for the same seed, so that failures can be repeated.

Not led by coverage: that is atheris' and libFuzzer's part.  native/replay.c does the same in C.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

MOST_BYTES = 1 << 16
"""An input that has grown longer is cut."""
MOST_CHANGES = 6
EDGES = (0, 1, 2, 4, 8, 0x0F, 0x10, 0x20, 0x7E, 0x7F, 0x80, 0xFF)
"""Bytes that mean something to one of the parsers, or are next to a limit."""


class Mutator:
    """`corpus` must not be empty; `tokens` are words of the format."""

    def __init__(self, seed: str, corpus: Sequence[bytes], tokens: Sequence[bytes]) -> None:
        self._random = random.Random(seed)
        self._corpus = corpus
        self._tokens = tokens or (b"\0",)
        self._changes: tuple[Callable[[bytearray], None], ...] = (
            self._flip,
            self._set,
            self._number,
            self._insert,
            self._token,
            self._delete,
            self._repeat,
            self._splice,
            self._truncate,
        )

    def inputs(self, count: int) -> Iterator[bytes]:
        for _ in range(count):
            data = bytearray(self._random.choice(self._corpus))
            for _ in range(self._random.randint(1, MOST_CHANGES)):
                self._random.choice(self._changes)(data)
            yield bytes(data[:MOST_BYTES])

    def _at(self, data: bytearray) -> int:
        return self._random.randint(0, len(data))

    def _span(self, data: bytearray) -> slice:
        """A stretch of it, mostly a short one."""
        at = self._at(data)
        return slice(at, at + self._random.choice((1, 2, 4, 8, 16, 64, 4096)))

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)

    def _set(self, data: bytearray) -> None:
        if data:
            data[self._random.randrange(len(data))] = self._random.choice(EDGES)

    def _number(self, data: bytearray) -> None:
        """A big-endian number close to a power of two."""
        size = self._random.choice((2, 4, 8))
        value = (1 << self._random.randint(0, 8 * size)) + self._random.randint(-1, 1)
        at = self._at(data)
        data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "big")

    def _insert(self, data: bytearray) -> None:
        at = self._at(data)
        data[at:at] = self._random.randbytes(self._random.choice((1, 2, 4, 8)))

    def _token(self, data: bytearray) -> None:
        at = self._at(data)
        data[at : at + self._random.choice((0, 1, 4))] = self._random.choice(self._tokens)

    def _delete(self, data: bytearray) -> None:
        del data[self._span(data)]

    def _repeat(self, data: bytearray) -> None:
        piece, at = data[self._span(data)], self._at(data)
        data[at:at] = piece * self._random.choice((1, 1, 2, 30))

    def _splice(self, data: bytearray) -> None:
        other = self._random.choice(self._corpus)
        data[self._at(data) :] = other[self._random.randint(0, len(other)) :]

    def _truncate(self, data: bytearray) -> None:
        del data[self._at(data) :]
