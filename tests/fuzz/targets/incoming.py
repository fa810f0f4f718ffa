"""A whole migration as a receiver with `continue` takes it: parser, states and C core together.  It
completes with all pages, or ends with an error that says who is to blame.  LOST in an input ends
a connection; the recovery's stream follows."""

from __future__ import annotations

import atexit
import functools
import socket
from types import SimpleNamespace

from sharded_pc.errors import HostError, ShardedPcError
from sharded_pc.incoming import Incoming
from sharded_pc.native.guests import Guests
from sharded_pc.state import MigrationStatus, PostcopyState
from sharded_pc.wire import return_path, writer
from sharded_pc.wire.feed import Feed
from tests import wire_twins
from tests.fuzz.targets import stream
from tests.stream_cases import BLOCKS, DATA

LOST = b"!lost!"
TOKENS = (
    *stream.TOKENS,
    DATA,
    LOST,
    writer.recv_bitmap("pc.ram"),
    writer.postcopy_resume(),
)


class _Memory:
    """One receiver's memory for all inputs, with workers that do their part."""

    def __init__(self) -> None:
        self.core = core = wire_twins.StraightPostcopy(BLOCKS)
        atexit.register(core.__exit__)
        self.guests = Guests(core.control)
        self.memory = SimpleNamespace(
            control=core.control,
            received=core.received,
            requested=core.requested,
            written=core.written,
            pool=SimpleNamespace(map=core.pool),
            blocks=[SimpleNamespace(fd=fd) for fd in core._fds],
            geometry=core.geometry,
            received_pages=self.received_pages,
            missing_pages=self.missing_pages,
        )

    def received_pages(self) -> list[int]:
        first = (self.core.control.block(index)[2] for index in range(len(BLOCKS)))
        return [self.core.received.count(at, b.pages) for at, b in zip(first, BLOCKS, strict=True)]

    def missing_pages(self) -> int:
        return sum(block.pages for block in BLOCKS) - sum(self.received_pages())

    def renew(self) -> None:
        control = self.core.control
        control.exchange_postcopy_state(PostcopyState.NONE)
        control.status = MigrationStatus.NONE
        control.note_transferred(0)
        self.core.received.clear(0, self.core.received.bits)


class _Connection:
    """Channels and receiver: notes what goes back, and takes one block list only."""

    def __init__(self, memory: _Memory) -> None:
        self.sent = b""
        self.guests = memory.guests
        self.aliases = memory.core.aliases
        self.acks_switchover = self.is_open = False

    @property
    def back(self) -> _Connection:
        return self

    def open(self) -> None:
        self.is_open = True

    def post(self, message: bytes) -> None:
        self.sent += message

    def send_bitmap(self, block: int) -> None:
        assert 0 <= block < len(BLOCKS)

    def define(self, blocks: tuple) -> None:
        if blocks != BLOCKS:
            raise HostError("other blocks")

    def load_devices(self, data: bytes) -> None:
        assert isinstance(data, bytes)

    def __getattr__(self, name: str):
        """The other calls change nothing that is looked at here."""
        return lambda *_, **__: None


_memory = functools.cache(_Memory)


def one_input(data: bytes) -> None:
    shared = _memory()
    shared.renew()
    connection = _Connection(shared)
    first, *recoveries = data.split(LOST)
    completed = _receive(first, shared, connection, resumes=False)
    for part in recoveries:
        if completed or shared.core.control.postcopy_state is not PostcopyState.RUNNING:
            break
        completed = _receive(part, shared, connection, resumes=True)
    assert completed == (shared.core.control.status is MigrationStatus.COMPLETED)
    if completed and shared.core.control.postcopy_state is PostcopyState.END:
        assert shared.received_pages() == [block.pages for block in BLOCKS]
    said = Feed(return_path.messages()).feed(connection.sent)
    shut = [each for each in said if isinstance(each, return_path.Shut)]
    assert shut == (said[-1:] if completed else [])


def _receive(data: bytes, shared: _Memory, connection: _Connection, *, resumes: bool) -> bool:
    """True if it completed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)  # an input fits into the socket's buffer
        ours.shutdown(socket.SHUT_WR)
        where = (shared.memory, theirs.fileno(), shared.core.stop)
        try:
            Incoming(*where, connection, connection, resumes=resumes).run()
        except ShardedPcError as error:
            assert str(error)
            return False
    return True
