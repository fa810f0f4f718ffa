"""The return path as a source reads it: messages or RemoteProtocolError, however it is cut."""

from __future__ import annotations

from collections.abc import Iterable

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.wire import return_path
from sharded_pc.wire.feed import Feed
from tests.fuzz.pieces import cut

TOKENS = (
    *(bytes([0, kind, 0, size]) for kind in range(9) for size in (0, 4, 12, 13)),
    b"\2\0",
    b"\6pc.ram",
)


def one_input(data: bytes) -> None:
    assert _play([data]) == _play(cut(data))


def _play(pieces: Iterable[bytes]) -> tuple[list, str | None]:
    feed, seen = Feed(return_path.messages()), []
    for piece in pieces:
        try:
            seen += feed.feed(piece)
        except RemoteProtocolError as error:
            return [], error.what  # what came before it in the piece is lost
    return seen, None
