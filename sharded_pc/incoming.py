"""The incoming migration: one connection's stream, from its first byte to its end.

Runs on a thread of its own.  The parser (wire/reader.py) says what the bytes mean, the state table
(state.py) whether that may come now, and messages.py does it.  RAM records never come there one by
one: native Ram takes a whole section at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sharded_pc.errors import ConnectionLost, RemoteProtocolError, StreamEnded
from sharded_pc.geometry import RamBlock
from sharded_pc.memory import GuestMemory
from sharded_pc.messages import Channels, Messages, Receiver
from sharded_pc.native.ram import Ram, Records, Stop, Stream, WireClosed
from sharded_pc.state import PostcopyState, listening
from sharded_pc.wire import events
from sharded_pc.wire import ram as ram_text
from sharded_pc.wire.reader import StreamReader
from sharded_pc.wire.steps import TELL, Parser, Peek, Some

__all__ = ["Incoming", "Receiver", "bad_record"]


class Incoming:
    """Drives one stream to its end.  `devices` holds the opaque device state afterwards.

    `resumes`: this is a recovery's stream; the blocks are known and guests run.  `broken_by()` says
    why a wire ended of which the kernel does not know it.
    """

    def __init__(
        self,
        memory: GuestMemory,
        fd: int,
        stop: Stop,
        channels: Channels,
        receiver: Receiver,
        record_fd: int = -1,
        *,
        resumes: bool = False,
        broken_by: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._memory = memory
        self._control = memory.control
        self._stream = Stream(fd, stop, record_fd, earlier=self._control.totals.transferred)
        self._reader = StreamReader(self._records)
        self._resumes = resumes
        self._broken_by = broken_by
        self._channels = channels
        self._messages = Messages(memory, self._stream, channels, receiver, stop)

    @property
    def state(self) -> PostcopyState:
        return self._control.postcopy_state

    @property
    def devices(self) -> bytes:
        return self._messages.devices

    def run(self) -> None:
        """Until the migration has completed; RemoteProtocolError, ConnectionLost, HostError,
        ShardError, Stopped."""
        try:
            self._drive(self._events())
        except WireClosed:
            self._channels.look_at_channels()
            raise self._wire_closed() from None
        except RemoteProtocolError as error:
            error.offset = self._stream.offset if error.offset is None else error.offset
            error.state = error.state or self.state.name
            raise
        finally:
            self._messages.release()
            self._control.note_transferred(self._stream.offset)

    def _events(self) -> Parser:
        if not self._resumes:
            return self._reader.events()
        assert self._control.ram_section is not None
        self._messages.go_on()
        return self._reader.resumed_events(self._control.ram_section)

    def _wire_closed(self) -> Exception:
        where, broken_by = self._stream.offset, self._stream.broken_by or self._broken_by()
        lost = "the connection to the source was lost" + (f" ({broken_by})" if broken_by else "")
        if listening(self.state):
            text = f"{lost} at stream offset {where} in postcopy state {self.state.name}: "
            text += f"{self._memory.missing_pages()} pages are still there"
            return ConnectionLost(text + ("" if self.state is PostcopyState.RUNNING else NOT_YET))
        if broken_by:
            return StreamEnded(lost, offset=where, state=self.state.name)
        return StreamEnded(
            "the source closed the stream before the migration was complete (cancelled?)",
            offset=where,
            state=self.state.name,
        )

    # Driving the parser

    def _drive(self, parser: Parser) -> None:
        answer = None
        while True:
            try:
                want = parser.send(answer)
            except StopIteration:
                return self._messages.complete()
            try:
                answer = self._serve(want)
            except RemoteProtocolError as error:
                parser.throw(error)  # it knows where the message began, and raises it again
                raise

    def _serve(self, want):
        match want:
            case int():
                return self._stream.read(want)
            case Some(most):
                return self._some(most)
            case Peek(size):
                return self._stream.peek(size)
            case _ if want is TELL:
                return self._stream.offset
            case _ if want is _RECORDS:
                assert self._messages.ram is not None
                return self._messages.ram.records()
            case event:
                return self._messages.handle(event)

    def _some(self, most: int) -> bytes:
        """A migration that completes in precopy may end with the wire (a file, say)."""
        try:
            return self._stream.some(min(most, 1 << 20))
        except WireClosed:
            if self._messages.ram is not None and not listening(self.state):
                return b""
            raise

    # RAM records, in C

    def _records(self) -> Parser:
        """The records of one section; the C twin of wire.ram.Channel.records."""
        if self._messages.ram is None:
            yield from self._setup_records()
            return
        while (outcome := (yield _RECORDS)) is Records.FLUSH:
            yield events.MultifdFlush()
        if outcome is not Records.EOS:
            raise bad_record(outcome, self._messages.ram, self._memory.geometry.blocks)
        # The section's footer may be long in coming: QEMU has it in its buffer while it waits for
        # the channels of multifd.
        self._channels.sync_channels(flush=False)

    def _setup_records(self) -> Parser:
        """The setup section begins with the block list; only then is there memory for pages."""
        blocks = yield from ram_text.first_record(self._reader.page_sizes)
        self._control.note_ram_section(self._reader.ram_id)
        yield events.RamBlocks(blocks)
        yield from self._records()


NOT_YET = (
    "; the guest had not begun to run here: a source from QEMU 10.2 on goes on with it, an older "
    "one keeps it stopped"
)
"""What it means to lose the source between the package and the destination's first instruction."""

_RECORDS = object()
"""A parser's wish: let the C core read RAM records."""


def bad_record(outcome: Records, ram: Ram, blocks: Sequence[RamBlock]) -> RemoteProtocolError:
    """The error of the reference (wire/ram.py) for a record that the C core refused."""
    error = {
        Records.MEM_SIZE: lambda: ram_text.second_block_list(),
        Records.BAD_FLAGS: lambda: ram_text.bad_flags(ram.header),
        Records.UNSUPPORTED: lambda: ram_text.unsupported(ram.header),
        Records.NO_BLOCK: lambda: ram_text.no_block(ram.header),
        Records.EMPTY_NAME: lambda: ram_text.empty_name(ram.header),
        Records.UNKNOWN_BLOCK: lambda: ram_text.unknown_block(ram.unknown_name),
        Records.OUTSIDE_BLOCK: lambda: ram_text.outside_block(ram.header, blocks[ram.bad_block]),
        Records.BAD_FILL: lambda: ram_text.bad_fill(ram.fill, ram.header),
        Records.NOT_IN_POSTCOPY: lambda: ram_text.not_in_postcopy(ram.header),
        Records.BAD_ENCODING: lambda: ram_text.bad_encoding(ram.fill, ram.header),
        Records.BAD_LENGTH: lambda: ram_text.bad_length(ram.encoded, ram.header),
        Records.BAD_ENCODED: lambda: ram_text.bad_encoded(ram.encoded, ram.header),
    }[outcome]()
    error.offset = ram.record_offset
    return error
