"""What a ChaosProxy does to a connection, and at which byte: plain values, drawn from a seed.

Moments are numbers of bytes that were forwarded, not times: the same seed meets the same byte of a
stream on a slow machine as on a fast one.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Iterator


class Way(enum.StrEnum):
    FORTH = "forth"
    """from who connects"""
    BACK = "back"


BOTH = (Way.FORTH, Way.BACK)


class Kind(enum.StrEnum):
    STALL = "stall"
    """nothing goes for `seconds`; `ways` says in which direction"""
    CUT = "cut"
    """FIN both ways; what was on its way is lost"""
    RESET = "reset"
    """RST both ways (a Unix socket has no such thing: it is closed)"""
    SILENCE = "silence"
    """half-open: nothing goes any more, and nobody is told"""
    CALL = "call"
    """the wire does nothing; its owner hears it and does what `note` says"""


ENDS = (Kind.CUT, Kind.RESET, Kind.SILENCE)
"""Nothing comes through behind one of these."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """Happens as soon as `at` bytes have been forwarded in the direction `counted`."""

    kind: Kind
    at: int
    counted: Way = Way.FORTH
    ways: tuple[Way, ...] = BOTH
    seconds: float = 0.0
    note: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Weather:
    """All that happens to one connection."""

    faults: tuple[Fault, ...] = ()
    piece_bytes: int = 1 << 16
    """the most that is written at once"""
    delay_s: float = 0.0
    """the longest for which a piece is held back"""
    seed: int | str = 0
    """of the pieces and their delays"""

    def pieces(self, way: Way) -> Iterator[tuple[int, float]]:
        """(bytes, seconds to wait before it) of each piece for ever; one in eight is tiny."""
        draw = random.Random(f"{self.seed}/{way}")
        while True:
            most = min(16, self.piece_bytes) if draw.random() < 0.125 else self.piece_bytes
            yield draw.randint(1, most), draw.uniform(0, self.delay_s)


FINE = Weather()


def storm(seed: int | str, stretch: int, *, most: int = 3, end: Kind | None = None) -> Weather:
    """Up to `most` stalls within the first `stretch` bytes, odd pieces, and then the `end` if one
    is wished for; the same for the same arguments."""
    draw = random.Random(f"{seed}/storm")
    faults = [_stall(draw, stretch) for _ in range(draw.randint(0, most))]
    if end is not None:
        faults.append(Fault(end, draw.randrange(stretch)))
    delay = draw.choice((0.0, 0.0, 0.0005))
    return Weather(tuple(faults), draw.choice((1 << 10, 1 << 14, 1 << 16)), delay, seed)


def _stall(draw: random.Random, stretch: int) -> Fault:
    ways = draw.choice((BOTH, (Way.FORTH,), (Way.BACK,)))
    return Fault(Kind.STALL, draw.randrange(stretch), ways=ways, seconds=draw.uniform(0.001, 0.05))
