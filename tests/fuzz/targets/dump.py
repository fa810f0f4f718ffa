"""A recording of any kind: messages that cover what was read, and at most one error with its place,
however the bytes come."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator

from sharded_pc.dump import Walk, text
from sharded_pc.errors import RemoteProtocolError
from tests.fuzz.pieces import cut
from tests.fuzz.targets import stream

TOKENS = (
    *stream.TOKENS,
    b"\x11\x22\x33\x44\0\0\0\1",
    b"\0\0\0\0\0\0\1\x20",
    b"\0\0\0\0\0\0\0\x60\1\0\1x",
    b"\x7e\0\0\0\3",
    b"mapped-ram",
)


class _Pieces(io.RawIOBase):
    """As a pipe gives them."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces: Iterator[bytes] = iter(pieces)

    def read(self, size: int = -1) -> bytes:
        return next(self._pieces, b"")


def one_input(data: bytes) -> None:
    assert _play([data], len(data)) == _play(cut(data), len(data))


def _play(pieces: Iterable[bytes], size: int) -> str:
    walk = Walk(_Pieces(pieces))  # type: ignore[arg-type]
    messages, at = list(walk.messages()), 0
    for message in messages:
        assert message["offset"] == at and message["size"] > 0
        at += message["size"]
    assert at <= size
    if walk.error is None:
        assert at == size
    else:
        assert type(walk.error).__mro__[-4:-3] and isinstance(walk.error, RemoteProtocolError)
        assert 0 <= walk.error.offset <= size
    assert all("\n" not in line for line in text.lines(messages))
    assert list(text.summary(walk.totals.blocks.values())) is not None
    return json.dumps([messages, str(walk.error), list(walk.totals.blocks.values())])
