"""What each message of the stream makes happen: memory, shards, return path, destination.

QEMU's words for the same: migration/savevm.c loadvm_postcopy_handle_*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import MAX_SOURCE_PAGE_BYTES, PAGE_BYTES, RamBlock
from sharded_pc.loading import Loading
from sharded_pc.memory import GuestMemory
from sharded_pc.native.alias import Alias
from sharded_pc.native.guests import Guests
from sharded_pc.native.ram import Ram, Stop, Stream
from sharded_pc.state import Message, MigrationStatus, PostcopyState, advance, listening
from sharded_pc.wire import events, return_path


class Back(Protocol):
    """The way back to the source (way_back.py)."""

    is_open: bool

    def open(self) -> None: ...

    def post(self, message: bytes) -> None: ...

    def send_bitmap(self, block: int) -> None: ...


class Channels(Protocol):
    """What the connection does for its stream; every call blocks until it is done."""

    back: Back

    def ram_begins(self) -> None:
        """The source sends RAM: channels that belong to the set-up are open by now."""

    def serve_requested(self, main: Ram) -> None:
        """Pages may be asked for from now on, and may come on a channel of their own, beside the
        main channel and its reader."""

    def requested_served(self) -> None:
        """The main channel has ended: what is on the way on the other arrives, or never does."""

    def stop_requested(self) -> None:
        """Nobody reads that other channel any more, or uses the main channel's reader."""

    def sync_channels(self, *, flush: bool) -> None:
        """Channels of multifd are where the main channel is: at a MULTIFD_FLUSH record (`flush`),
        or at a section's end, where an older source (8.0 and before) has them meet."""

    def settle_channels(self) -> None:
        """No page may come on a channel of multifd any more."""

    def look_at_channels(self) -> None:
        """The main channel has ended too early: raises why, if a channel of multifd knows."""


class Receiver(Protocol):
    """What the migration does for the stream; every call blocks until it is done."""

    guests: Guests
    """whose requested pages are served at once; there after define()"""
    aliases: Sequence[Alias]
    """of each block, for payload to land in, none with `copy`; there after define()"""

    def define(self, blocks: tuple[RamBlock, ...]) -> None:
        """The block list is known: memory is checked and made, workers map it."""

    async def give_channel(self, number: int, fd: int, record: str | None) -> int:
        """A worker receives a channel of multifd from now on, and writes it down in the file
        `record`; its pid.  In the loop; ShardError."""

    def prepare_discard(self) -> None: ...

    def listen(self) -> None:
        """All discards are done, or the migration goes on after a pause: arm faults, send
        requests."""

    def configured(self, machine: str) -> None:
        """The source's machine type."""

    @property
    def acks_switchover(self) -> bool:
        """Once that is known: the source waits for a SWITCHOVER_ACK."""

    def load_devices(self, data: bytes) -> Future | None:
        """Starts a destination's loading of device state; None if nobody loads it.  The stream
        goes on meanwhile."""

    def placed(self) -> None:
        """Every page is here: release the guests."""

    def status_changed(self, status: MigrationStatus) -> None: ...


class Messages:
    """One connection's messages, obeyed in order.  `devices` holds the opaque device state
    afterwards, `ram` reads RAM records once the blocks are known."""

    def __init__(
        self,
        memory: GuestMemory,
        stream: Stream,
        channels: Channels,
        receiver: Receiver,
        stop: Stop,
    ) -> None:
        self._memory = memory
        self._control = memory.control
        self._stream = stream
        self._channels = channels
        self._back = channels.back
        self._receiver = receiver
        self._stop = stop
        self.ram: Ram | None = None
        self.devices = b""
        self._loading: Loading | None = None
        self._handlers: dict[type, tuple[Message | None, Callable]] = {
            events.Configuration: (None, self._configuration),
            events.RamBlocks: (None, self._blocks),
            events.RamSection: (None, self._ram_section),
            events.RamSectionEnd: (None, self._ram_section_end),
            events.MultifdFlush: (None, self._flush),
            events.OpenReturnPath: (Message.OPEN_RETURN_PATH, self._open_return_path),
            events.Ping: (Message.PING, self._ping),
            events.PostcopyAdvise: (Message.POSTCOPY_ADVISE, _check_advise),
            events.RamDiscard: (Message.POSTCOPY_RAM_DISCARD, self._discard),
            events.SwitchoverStart: (Message.SWITCHOVER_START, _nothing),
            events.Packaged: (Message.PACKAGED, self._packaged),
            events.PostcopyListen: (Message.POSTCOPY_LISTEN, self._listen),
            events.PackagedDevices: (Message.PACKAGED_DEVICES, self._load_packaged),
            events.PostcopyRun: (Message.POSTCOPY_RUN, lambda _: self._control.note_running()),
            events.RecvBitmap: (Message.RECV_BITMAP, self._recv_bitmap),
            events.PostcopyResume: (Message.POSTCOPY_RESUME, self._resume),
            events.Devices: (Message.DEVICES, self._load_precopied),
            events.Eof: (Message.EOF, self._eof),
            events.VmDescription: (Message.VMDESCRIPTION, _nothing),
        }

    @property
    def state(self) -> PostcopyState:
        return self._control.postcopy_state

    def go_on(self) -> None:
        """Before the messages of a recovery: the blocks are known and guests run."""
        self._back.open()
        self.ram = ram_reader(self._memory, self._stream, self._receiver, self._stop)
        self.ram.enter_postcopy()
        self._channels.serve_requested(self.ram)

    def release(self) -> None:
        """No more messages come."""
        self._channels.stop_requested()
        if self.ram is not None:
            self.ram.release()
            self.ram = None

    def handle(self, event: object) -> None:
        if self._loading is not None and self._loading.takes(event):
            return
        if isinstance(event, events.Eof) and self._loading is not None:
            self._loading.wait()
        self._obey(event)

    def _obey(self, event: object) -> None:
        message, handler = self._handlers[type(event)]
        state = self.state
        after = advance(state, message) if message is not None else state
        handler(event)
        if after != state and self.state == state:
            self._control.exchange_postcopy_state(after)

    # What each event does

    def _configuration(self, event: events.Configuration) -> None:
        self._receiver.configured(event.machine)

    def _blocks(self, event: events.RamBlocks) -> None:
        self._receiver.define(event.blocks)
        self.ram = ram_reader(self._memory, self._stream, self._receiver, self._stop)
        self._control.note_setup()
        self._status(MigrationStatus.ACTIVE)

    def _ram_section(self, event: events.RamSection) -> None:
        advance(self.state, _SECTIONS[event.kind])

    def _flush(self, event: events.MultifdFlush) -> None:
        self._channels.sync_channels(flush=True)

    def _ram_section_end(self, event: events.RamSectionEnd) -> None:
        if event.kind != "setup":
            self._channels.ram_begins()
        self._control.note_transferred(self._stream.offset)

    def _open_return_path(self, event: events.OpenReturnPath) -> None:
        self._back.open()
        if self._receiver.acks_switchover:  # no device here has a word in it
            self._back.post(return_path.switchover_ack())

    def _ping(self, event: events.Ping) -> None:
        if not self._back.is_open:
            raise RemoteProtocolError("PING before OPEN_RETURN_PATH")
        self._back.post(return_path.pong(event.value))

    def _discard(self, event: events.RamDiscard) -> None:
        if self.ram is None:
            raise RemoteProtocolError("POSTCOPY_RAM_DISCARD before the block list")
        if self.state is PostcopyState.ADVISE:
            self._prepare_discard()
        index = _index(self._memory, "discard in", event.block)
        block = self._memory.geometry.blocks[index]
        bad = self.ram.discards(index, event.ranges)
        if bad is not None:
            raise _bad_discard(block, *event.ranges[bad])
        if self.state is PostcopyState.DISCARD:
            self.ram.discards_ahead()

    def _prepare_discard(self) -> None:
        self._control.note_stopped()
        self._channels.settle_channels()
        self._receiver.prepare_discard()

    def _packaged(self, event: events.Packaged) -> None:
        if self.ram is None:
            raise RemoteProtocolError("PACKAGED before the block list")

    def _listen(self, event: events.PostcopyListen) -> None:
        if not self._back.is_open:
            raise RemoteProtocolError("POSTCOPY_LISTEN without OPEN_RETURN_PATH: no way to ask")
        if self.state is PostcopyState.ADVISE:  # nothing to discard: QEMU prepares here too
            self._prepare_discard()
        self.ram.drain()  # every discard is done before a fault can be armed
        self.ram.enter_postcopy()
        self._channels.serve_requested(self.ram)
        self._control.exchange_postcopy_state(PostcopyState.LISTENING)
        self._status(MigrationStatus.POSTCOPY_ACTIVE)
        self._receiver.listen()

    def _load_packaged(self, event: events.PackagedDevices) -> None:
        self.devices = event.data
        self._load(event.data, packaged=True)

    def _load(self, devices: bytes, *, packaged: bool) -> None:
        future = self._receiver.load_devices(devices)
        if future is not None:
            self._loading = Loading(future, self._obey, self._stop, packaged=packaged)

    def _load_precopied(self, event: events.Devices) -> None:
        """All RAM is here: whoever maps it runs on plain memory from now on."""
        self.devices = event.data
        self._control.note_stopped()
        self._channels.settle_channels()
        self.ram.drain()
        self.ram.clear_unsent()
        self._receiver.placed()
        self._load(event.data, packaged=False)

    def _recv_bitmap(self, event: events.RecvBitmap) -> None:
        index = _index(self._memory, "RECV_BITMAP of", event.block)
        self.ram.drain()  # what is in the rings is here
        self._back.send_bitmap(index)

    def _resume(self, event: events.PostcopyResume) -> None:
        self._back.post(return_path.resume_ack())
        self._receiver.listen()
        self._status(MigrationStatus.POSTCOPY_ACTIVE)

    def _eof(self, event: events.Eof) -> None:
        if self.ram is None:
            raise RemoteProtocolError("the stream ends before any RAM")
        if self._loading is not None and not listening(self.state):
            self._control.note_running()
        self.ram.drain()
        if not listening(self.state):
            return
        self._channels.requested_served()
        missing = self._memory.missing_pages()
        if missing:
            raise RemoteProtocolError(f"the source ended with {missing} pages never sent")
        self._receiver.placed()

    def complete(self) -> None:
        """The parser is content: the migration has arrived."""
        self._control.note_ended()
        self._control.note_transferred(self._stream.offset)
        self._status(MigrationStatus.COMPLETED)
        if self._back.is_open:
            self._back.post(return_path.shut(0))

    def _status(self, status: MigrationStatus) -> None:
        self._control.status = status
        self._receiver.status_changed(status)


def _nothing(event: object) -> None:
    pass


def _index(memory: GuestMemory, what: str, block: str) -> int:
    try:
        return memory.geometry.index(block)
    except KeyError:
        raise RemoteProtocolError(f"{what} unknown block {block!r}") from None


def _bad_discard(block: RamBlock, start: int, length: int) -> RemoteProtocolError:
    page = block.source_page_size
    if start % page or length % page or length == 0:
        return RemoteProtocolError(
            f"discard of {length:#x} bytes at {start:#x} in block {block.name!r} is not whole "
            f"{page}-byte pages"
        )
    return RemoteProtocolError(
        f"discard of {length:#x} bytes at {start:#x} outside block {block.name!r} of "
        f"{block.size:#x} bytes"
    )


def ram_reader(memory: GuestMemory, stream: Stream, receiver: Receiver, stop: Stop) -> Ram:
    """After define()."""
    ram = Ram(stream, memory.control, memory.received, memory.requested, memory.pool.map, stop)
    for index, segment in enumerate(memory.blocks):
        ram.use_block(index, segment.fd)
    if receiver.aliases:
        ram.go_straight(memory.written, receiver.aliases)
    ram.serve(receiver.guests)
    return ram


_SECTIONS = {
    "setup": Message.RAM_SETUP,
    "part": Message.RAM_PRECOPY,
    "end": Message.RAM_END,
}


SOURCE_PAGE_SIZES = 2 * MAX_SOURCE_PAGE_BYTES - PAGE_BYTES
"""A summary, the sizes' bitwise OR, has no other bits."""


def _check_advise(event: events.PostcopyAdvise) -> None:
    if event.page_sizes is None:
        raise RemoteProtocolError(
            "POSTCOPY_ADVISE for dirty bitmaps only: turn the source's dirty-bitmaps "
            "capability off or its postcopy-ram capability on"
        )
    if event.target_page_size != PAGE_BYTES:
        raise RemoteProtocolError(
            f"target pages of {event.target_page_size} bytes, expected {PAGE_BYTES}"
        )
    if event.page_sizes == 0 or event.page_sizes & ~SOURCE_PAGE_SIZES:
        raise RemoteProtocolError(
            f"RAM with page sizes {event.page_sizes:#x}, expected {PAGE_BYTES:#x} to "
            f"{MAX_SOURCE_PAGE_BYTES:#x}"
        )
