"""A process that sends a job (jobs.py) as a source would: from the page cache, at full speed.

It reads and drops the return path meanwhile; a message there is the end of what is measured.  With
TLS each connection has a thread that encrypts, as our own receiver has (transport/tls/pump.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from sharded_pc import address, processes
from sharded_pc.address import UnixAddress
from sharded_pc.bench import usage
from sharded_pc.bench.jobs import Job
from sharded_pc.errors import HostError, ShardedPcError
from sharded_pc.transport.tls.pump import Pump
from sharded_pc.transport.tls.wire import TlsWire
from sharded_pc.wire import return_path
from sharded_pc.wire.feed import Feed
from sharded_pc.wire.return_path import ReqPages, Shut

ANSWER_SECONDS = 300.0
HANDSHAKE_SECONDS = 30.0


class NotTaken(ShardedPcError):
    """The receiver closed the stream, or refused it; it knows why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """Times are nanoseconds from the first byte behind the set-up on."""

    ns: int
    """until all pages were in place"""
    sent_ns: int
    """until the last byte was taken"""
    cpu_seconds: float
    """of the processes that were named, until all pages were in place"""
    requests: int
    """for pages, on the return path"""


@dataclasses.dataclass(frozen=True, slots=True)
class Where:
    """`tls`: the folder of the source's certificate, None: plain.  `pause`: seconds."""

    uri: str
    pause: float
    tls: str | None = None


def _connect(uri: str) -> socket.socket:
    where = address.parse(uri)
    if isinstance(where, UnixAddress):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(where.path)
        return sock
    assert isinstance(where, address.TcpAddress)
    return socket.create_connection((where.host, where.port))


@contextlib.contextmanager
def _connected(where: Where) -> Iterator[socket.socket]:
    """A connection's plain end."""
    if where.tls is None:
        with _connect(where.uri) as sock:
            yield sock
        return
    plain, end = socket.socketpair()
    wire = TlsWire(_connect(where.uri), _context(Path(where.tls)), server_side=False)
    with contextlib.closing(Pump(wire, end)) as pump, plain:
        wire.handshake(HANDSHAKE_SECONDS)
        running = threading.Thread(target=pump.run, daemon=True)
        running.start()
        try:
            yield plain
        finally:
            with contextlib.suppress(OSError):
                plain.shutdown(socket.SHUT_RDWR)
            running.join(ANSWER_SECONDS)


def _context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # no name of a network's: both ends are here
    context.load_verify_locations(folder / "ca-cert.pem")
    context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context


class _ReturnPath:
    """Reads until SHUT on a thread of its own; `pids` are looked at when what `ends` the measure
    comes."""

    def __init__(self, sock: socket.socket, ends: Callable[[object], bool]) -> None:
        self._sock, self._ends = sock, ends
        self.pids: list[int] = []
        self.shut: Shut | None = None
        self.end_ns = self.requests = 0
        self.cpu_seconds = 0.0
        self.error: Exception | None = None
        self._is_there = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        feed = Feed(return_path.messages())
        try:
            while self.shut is None and (data := self._sock.recv(1 << 16)):
                now = time.monotonic_ns()
                for message in feed.feed(data):
                    self._note(message, now)
        except (OSError, ShardedPcError) as error:
            self.error = error
        self._is_there.set()

    def _note(self, message: object, now: int) -> None:
        self.requests += isinstance(message, ReqPages)
        if self._ends(message):
            self.cpu_seconds, self.end_ns = usage.tree_cpu_seconds(self.pids), now
            self._is_there.set()
        if isinstance(message, Shut):
            self.shut = message

    def wait_end(self) -> None:
        """Returns when all pages are in place; NotTaken."""
        self._is_there.wait(ANSWER_SECONDS)
        if not self.end_ns:
            self.wait_shut()
            raise NotTaken("the receiver ended before all pages were in place")

    def wait_shut(self) -> None:
        """Returns when SHUT(0) was read; NotTaken."""
        self._thread.join(ANSWER_SECONDS)
        if self.shut is None:
            raise NotTaken(f"the receiver ended the return path without SHUT ({self.error})")
        if self.shut.value:
            raise NotTaken(f"the receiver failed: SHUT {self.shut.value}")


def _once(conn: Connection, job: Job, where: Where) -> Sent:
    with contextlib.ExitStack() as stack:
        connect = lambda: stack.enter_context(_connected(where))  # noqa: E731
        main = connect()
        back = _ReturnPath(main, job.ends)
        try:
            job.open(main, connect)
            time.sleep(where.pause)
            conn.send("paused")
            back.pids = conn.recv()
            cpu, began = usage.tree_cpu_seconds(back.pids), time.monotonic_ns()
            job.send()
            sent = time.monotonic_ns()
            back.wait_end()
            job.finish()
        except OSError as error:
            raise NotTaken(f"the receiver closed the stream: {error.strerror}") from error
        back.wait_shut()
    return Sent(back.end_ns - began, sent - began, back.cpu_seconds - cpu, back.requests)


def _sender(conn: Connection) -> None:
    """The process: an order is answered by "paused", which is answered by pids, then the result."""
    while (order := conn.recv()) is not None:
        try:
            answer: object = _once(conn, *order)
        except (OSError, ShardedPcError) as error:
            answer = str(error)
        conn.send(answer)


class Sender:
    """The parent's end; a context manager.  Its methods block."""

    def __init__(self) -> None:
        self._process, self._conn = processes.start(_sender, name="bench-sender", daemon=True)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._conn.close()

    def _answer(self) -> object:
        try:
            if self._conn.poll(2 * ANSWER_SECONDS):
                return self._conn.recv()
        except (EOFError, ConnectionResetError):
            raise HostError("the benchmark's sender died") from None
        raise HostError("the benchmark's sender said nothing")

    def send(self, job: Job, where: Where, on_pause: Callable[[], list[int]]) -> Sent:
        """Sends everything, stopping for `where.pause` seconds behind the set-up; then `on_pause()`
        names the processes whose CPU time counts.  NotTaken, HostError."""
        self._conn.send((job, where))
        answer = self._answer()
        if answer == "paused":
            self._conn.send(on_pause())
            answer = self._answer()
        if not isinstance(answer, Sent):
            raise NotTaken(str(answer))
        return answer
