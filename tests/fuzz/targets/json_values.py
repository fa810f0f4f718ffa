"""A byte stream cut into JSON values: the same objects however it comes, or ValueError; and no more
is kept than the longest value may have."""

from __future__ import annotations

import json
from collections.abc import Iterable

from sharded_pc.transport.json_stream import JsonSplitter
from tests.fuzz.pieces import cut

TOKENS = (
    b'{"execute":"quit"}',
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\u0000",
    b"\\",
    b"1.5e3",
    b"true",
    b"\xc3\xa9",
    b"\xf0\x9f\x98\x80",
    b"\n",
)


def one_input(data: bytes) -> None:
    assert _take([data]) == _take(cut(data))


def _take(pieces: Iterable[bytes]) -> list[str]:
    """The values as text, and the error."""
    splitter, seen = JsonSplitter(), []
    try:
        for piece in pieces:
            splitter.feed(piece)
            while (value := splitter.take()) is not None:
                seen.append(json.dumps(value))
    except ValueError:
        seen.append("ValueError")
    return seen
