"""A process that sends a recording as a source would, from the page cache as fast as it is taken.

It reads and drops the return path meanwhile; SHUT there is the end of what is measured.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from sharded_pc import address, processes
from sharded_pc.address import UnixAddress
from sharded_pc.bench import usage
from sharded_pc.errors import HostError, ShardedPcError
from sharded_pc.wire import return_path
from sharded_pc.wire.feed import Feed
from sharded_pc.wire.return_path import ReqPages, Shut

ANSWER_SECONDS = 300.0
MOST_AT_ONCE = 1 << 30
"""sendfile(2) takes less than 2 GiB."""


class NotTaken(ShardedPcError):
    """The receiver closed the stream, or refused it; it knows why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """Times are nanoseconds from the first byte behind the set-up on."""

    ns: int
    """until SHUT was read"""
    sent_ns: int
    """until the last byte was taken"""
    cpu_seconds: float
    """of the processes that were named, until SHUT"""
    requests: int
    """for pages, on the return path"""


def _connect(uri: str) -> socket.socket:
    where = address.parse(uri)
    if isinstance(where, UnixAddress):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(where.path)
        return sock
    assert isinstance(where, address.TcpAddress)
    return socket.create_connection((where.host, where.port))


class _ReturnPath:
    """Reads until SHUT on a thread of its own; `pids` are looked at when it comes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.pids: list[int] = []
        self.shut: Shut | None = None
        self.shut_ns = self.requests = 0
        self.cpu_seconds = 0.0
        self.error: Exception | None = None
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

    def _note(self, message: object, now: int) -> None:
        self.requests += isinstance(message, ReqPages)
        if isinstance(message, Shut):
            self.cpu_seconds = usage.tree_cpu_seconds(self.pids)
            self.shut, self.shut_ns = message, now

    def wait(self) -> None:
        """Returns when SHUT(0) was read; NotTaken."""
        self._thread.join(ANSWER_SECONDS)
        if self.shut is None:
            raise NotTaken(f"the receiver ended the return path without SHUT ({self.error})")
        if self.shut.value:
            raise NotTaken(f"the receiver failed: SHUT {self.shut.value}")


def _send(sock: socket.socket, file: int, start: int, end: int) -> None:
    while start < end:
        start += os.sendfile(sock.fileno(), file, start, min(end - start, MOST_AT_ONCE))


def _once(conn: Connection, file: int, size: int, uri: str, setup_end: int, pause: float) -> Sent:
    with _connect(uri) as sock:
        back = _ReturnPath(sock)
        try:
            _send(sock, file, 0, setup_end)
            time.sleep(pause)
            conn.send("paused")
            back.pids = conn.recv()
            cpu, began = usage.tree_cpu_seconds(back.pids), time.monotonic_ns()
            _send(sock, file, setup_end, size)
        except OSError as error:
            raise NotTaken(f"the receiver closed the stream: {error.strerror}") from error
        sent = time.monotonic_ns()
        back.wait()
    return Sent(back.shut_ns - began, sent - began, back.cpu_seconds - cpu, back.requests)


def _sender(conn: Connection, path: str) -> None:
    """The process: an order is answered by "paused", which is answered by pids, then the result."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size = os.fstat(file).st_size
    while (order := conn.recv()) is not None:
        try:
            answer: object = _once(conn, file, size, *order)
        except (OSError, ShardedPcError) as error:
            answer = str(error)
        conn.send(answer)


class Sender:
    """The parent's end; a context manager.  Its methods block."""

    def __init__(self, path: str) -> None:
        self._process, self._conn = processes.start(_sender, path, name="bench-sender", daemon=True)

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

    def send(
        self, uri: str, setup_end: int, pause: float, on_pause: Callable[[], list[int]]
    ) -> Sent:
        """Sends everything to `uri`, stopping for `pause` seconds at `setup_end` bytes; then
        `on_pause()` names the processes whose CPU time counts.  NotTaken, HostError."""
        self._conn.send((uri, setup_end, pause))
        answer = self._answer()
        if answer == "paused":
            self._conn.send(on_pause())
            answer = self._answer()
        if not isinstance(answer, Sent):
            raise NotTaken(str(answer))
        return answer
