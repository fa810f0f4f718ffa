"""A whole migration stream: events or RemoteProtocolError, the same ones however it is cut, no page
outside the blocks that it declared, and never much wanted at once."""

from __future__ import annotations

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.wire import events
from sharded_pc.wire.feed import Feed
from sharded_pc.wire.ram import Channel
from sharded_pc.wire.reader import StreamReader
from sharded_pc.wire.steps import TELL, Parser, Some
from tests.fuzz.pieces import cut

TOKENS = (
    b"QEVM\0\0\0\3",
    b"\x03ram\0\0\0\0\0\0\0\4",
    b"\x7e\0\0\0\2",
    b"\6pc.ram",
    b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\2",
    *(bytes([8, 0, command, 0, size]) for command in range(13) for size in (0, 4)),
    b"\0\6\0\0\0\2{}",
    b'{"a":',
)
MOST_WANTED = 0xFFFF
"""Bytes: a command's payload is the longest thing that is asked for whole."""
_DEVICES = "device state outside a package"


def one_input(data: bytes) -> None:
    assert _play([data]) == _play(cut(data)), "cut in pieces it says something else"


def _play(pieces) -> tuple[list, tuple | None]:
    """Events up to device state, whose end depends on where the stream ends; and the error."""
    seen: list = []
    feed = Feed(_watched(seen))
    try:
        for piece in pieces:
            feed.feed(piece)
        feed.eof()
    except RemoteProtocolError as error:
        assert str(error)
        refused = (error.what, error.offset)
    else:
        refused = None
    if _DEVICES in seen:
        return seen[: seen.index(_DEVICES)], None
    return seen, refused


def _watched(seen: list) -> Parser:
    """The stream's parser; its events are checked and kept."""
    blocks: dict = {}
    channel = Channel(blocks)
    parser = StreamReader(channel.records).events()
    answer = None
    while True:
        try:
            want = parser.send(answer)
        except StopIteration:
            return
        answer = None
        if isinstance(want, int | Some) or want is TELL:
            assert not isinstance(want, int) or 0 < want <= MOST_WANTED
            if isinstance(want, Some) and not isinstance(seen[-1], events.Packaged):
                seen.append(_DEVICES)
            answer = yield want
        else:
            _check(want, blocks)
            seen.append(want)


def _check(event: object, blocks: dict) -> None:
    match event:
        case events.RamBlocks(declared):
            blocks.update((block.name, block) for block in declared)
        case events.RamPage(block, offset, data):
            assert 0 <= offset < blocks[block].size and offset % PAGE_BYTES == 0
            assert len(data) == PAGE_BYTES
        case events.RamZeroPage(block, offset):
            assert 0 <= offset < blocks[block].size and offset % PAGE_BYTES == 0
