"""Drives a parser from byte strings: the reference driver, for tests and tools."""

from __future__ import annotations

from collections.abc import Callable

from sharded_pc.errors import StreamEnded
from sharded_pc.geometry import RamBlock
from sharded_pc.wire import events
from sharded_pc.wire.ram import Channel
from sharded_pc.wire.reader import StreamReader
from sharded_pc.wire.steps import TELL, Parser, Peek, Some


class Feed:
    """feed(bytes) gives the events they complete; eof() says that no more will come.

    `done` is true after the parser has ended; bytes behind that are refused.
    """

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._buffer = bytearray()
        self._offset = 0
        self._out: list = []
        self.done = False
        self._want = None
        self._send(None)

    def feed(self, data: bytes) -> list:
        """Events completed by `data`, in order."""
        self._buffer += data
        while not self.done and self._serve():
            pass
        out, self._out = self._out, []
        return out

    def eof(self) -> list:
        """The stream is over: StreamEnded unless the parser can live with that."""
        if not self.done and isinstance(self._want, Some) and not self._buffer:
            self._send(b"")
            while not self.done and self._serve():
                pass
        if not self.done:
            offset = self._offset + len(self._buffer)
            raise StreamEnded("the stream ended in the middle", offset=offset)
        out, self._out = self._out, []
        return out

    def _send(self, value: object) -> None:
        try:
            self._want = self._parser.send(value)
        except StopIteration:
            self.done = True

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._offset += size
        return data

    def _serve(self) -> bool:
        """Answers one wish; False if more bytes are needed."""
        want = self._want
        if want is TELL:
            self._send(self._offset)
        elif isinstance(want, int):
            if len(self._buffer) < want:
                return False
            self._send(self._take(want))
        elif isinstance(want, Peek):
            if len(self._buffer) < want.size:
                return False
            self._send(bytes(self._buffer[: want.size]))
        elif isinstance(want, Some):
            if not self._buffer:
                return False
            self._send(self._take(min(want.most, len(self._buffer))))
        else:
            self._out.append(want)
            self._send(None)
        return True


def read_stream(on_blocks: Callable[[tuple[RamBlock, ...]], None] | None = None) -> Feed:
    """A Feed of a whole migration stream, RAM pages included, all in Python."""
    blocks: dict[str, RamBlock] = {}
    channel = Channel(blocks)

    def records() -> Parser:
        channel.postcopy = reader.switched
        parser = channel.records(reader.page_sizes)
        answer = None
        while True:
            try:
                want = parser.send(answer)
            except StopIteration:
                return
            if isinstance(want, events.RamBlocks):
                blocks.update((block.name, block) for block in want.blocks)
                if on_blocks:
                    on_blocks(want.blocks)
            answer = yield want

    reader = StreamReader(records)
    return Feed(reader.events())
