"""An input as it might come off a socket."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

_SIZES = (1, 1, 2, 7, 8, 9, 60, 100, 4096, 4104, 9000)
SHORT = 64
"""Bytes: what is no longer comes byte by byte."""


def cut(data: bytes) -> Iterator[bytes]:
    """Pieces whose sizes follow from the data."""
    rng, at = random.Random(zlib.crc32(data)), 0
    while at < len(data):
        size = rng.choice(_SIZES) if len(data) > SHORT else 1
        yield data[at : at + size]
        at += size
