"""How a parser talks to whoever feeds it.

A parser is a generator.  It yields what it wants and is sent the answer:

=====================  ==================================================
yields                 is sent
=====================  ==================================================
``int`` n              exactly n bytes
``Some(n)``            at least one and at most n bytes
``Peek(n)``            exactly n bytes, which are the next ones afterwards as well
``TELL``               the stream offset of the next byte
an event               None
=====================  ==================================================

Parsers compose with ``yield from``.  Feed (feed.py) drives one from byte strings; the receiver
drives the same one from the wire, with the RAM records done in C.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Generator
from typing import Any

from sharded_pc.errors import RemoteProtocolError

Parser = Generator[Any, Any, Any]


class _Tell(enum.Enum):
    TELL = "tell"


TELL = _Tell.TELL


@dataclasses.dataclass(frozen=True, slots=True)
class Some:
    """Ask for whatever is there: 1..most bytes."""

    most: int


@dataclasses.dataclass(frozen=True, slots=True)
class Peek:
    """Look at the next `size` bytes (at most 16), and leave them."""

    size: int


def number(size: int) -> Parser:
    """A big-endian unsigned number of `size` bytes."""
    return int.from_bytes((yield size), "big")


def counted_text(what: str) -> Parser:
    """A u8 length and that many bytes, as text."""
    size = yield from number(1)
    if size == 0:
        raise RemoteProtocolError(f"{what} with an empty name")
    return text((yield size))


def text(raw: bytes) -> str:
    """Names are bytes to QEMU; ours are text that survives a round trip."""
    return bytes(raw).decode("utf-8", "surrogateescape")
