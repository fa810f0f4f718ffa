"""A file's bytes in pieces: no more of it in memory than a parser wants at once."""

from __future__ import annotations

import struct
from typing import BinaryIO

from sharded_pc.dump.wishes import TAIL
from sharded_pc.errors import StreamEnded
from sharded_pc.wire.constants import Section

PIECE = 1 << 20
BEHIND_A_FOOTER = bytes(
    (Section.EOF, Section.START, Section.PART, Section.END, Section.FULL, Section.COMMAND)
)
"""What may follow; in a device's state the five bytes of a footer may stand by chance."""


class Window:
    """`at` is the offset of the next byte.  Reads on as it is asked, never back: pipes will do."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._buffer = b""
        self._next = 0
        self._over = False
        self.at = 0

    def _has(self, size: int) -> bool:
        """Reads until `size` bytes are there, or the file ends."""
        pieces, have = [self._buffer[self._next :]], len(self._buffer) - self._next
        if have >= size:
            return True
        while have < size and not self._over:
            piece = self._file.read(PIECE)
            self._over = not piece
            pieces.append(piece)
            have += len(piece)
        self._buffer, self._next = b"".join(pieces), 0
        return have >= size

    def _pass(self, size: int) -> None:
        self._next += size
        self.at += size

    def peek(self, most: int, *, whole: bool = False) -> bytes:
        """The next bytes, fewer than `most` only at the end, and not if they are to be `whole`:
        StreamEnded."""
        if not self._has(most) and whole:
            raise self._ended(most)
        return self._buffer[self._next : self._next + most]

    def take(self, size: int) -> bytes:
        """StreamEnded."""
        if not self._has(size):
            raise self._ended(size)
        data = self._buffer[self._next : self._next + size]
        self._pass(size)
        return data

    def some(self, most: int) -> bytes:
        """At least one byte, none at the end."""
        self._has(1)
        data = self._buffer[self._next : self._next + most]
        self._pass(len(data))
        return data

    def skip(self, size: int) -> None:
        """StreamEnded."""
        left = size
        while left:
            if not self._has(1):
                raise StreamEnded(
                    f"the stream ends there: {size} bytes expected, {size - left} are there",
                    offset=self.at,
                )
            step = min(left, len(self._buffer) - self._next)
            self._pass(step)
            left -= step

    def view(self) -> memoryview:
        """What is in memory from here on, at least a byte unless the file is over; see pass_()."""
        self._has(1)
        return memoryview(self._buffer)[self._next :]

    def passed(self, size: int) -> None:
        """That much of view() is done with."""
        self._pass(size)

    def footer(self, section: int, most: int | None) -> int | None:
        """wishes.Footer: how many bytes stand before it."""
        mark, start = struct.pack(">BI", Section.FOOTER, section), self.at
        while True:
            self._has(PIECE if most is None else min(PIECE, most - (self.at - start)))
            left = None if most is None else most - (self.at - start)
            data = self.peek(PIECE if left is None else min(PIECE, left))
            last = len(data) < PIECE
            if (found := _footer_in(data, mark, last)) is not None:
                self._pass(found)
                return self.at - start
            self._pass(max(len(data) - TAIL, 0))
            if last:
                return None

    def _ended(self, size: int) -> StreamEnded:
        have = len(self._buffer) - self._next
        return StreamEnded(
            f"the stream ends there: {size} bytes expected, {have} are there", offset=self.at
        )


def _footer_in(data: bytes, mark: bytes, last: bool) -> int | None:
    at = data.find(mark)
    while at >= 0:
        behind = data[at + len(mark) : at + len(mark) + 1]
        if behind in BEHIND_A_FOOTER and (behind or last):
            return at
        at = data.find(mark, at + 1)
    return None
