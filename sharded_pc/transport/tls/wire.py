"""The end of a connection that carries TLS: one SSL object, which touches no socket itself.

What it answers by itself, key updates and alerts, goes out with the rest.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time

CHUNK_BYTES = 256 << 10
"""Many TLS records (16 KiB): one read and one write for all of them."""
LINGER_SECONDS = 1.0
"""How long what still comes is read and thrown away at the end: closing with unread bytes resets
the connection, and the peer would lose our last words."""


class ClosedEarly(Exception):
    """The peer closed the connection in the middle of the handshake."""


class TlsWire:
    """`sock` is taken over, and made non-blocking.  One thread's."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool = True,
        server_hostname: str | None = None,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._come, self._go = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._come, self._go, server_side, server_hostname)
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._sealed = memoryview(b"")
        self.has_ended = False
        """by a close_notify, or without one"""
        self.opening = b""
        """the first bytes of the peer"""

    def handshake(self, seconds: float) -> None:
        """TimeoutError, ClosedEarly, OSError; ssl.SSLError once the peer was told."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush_until(deadline)
                self._await(select.POLLIN, deadline)
                self.receive()
                if self.has_ended:
                    raise ClosedEarly from None
            except ssl.SSLError:
                self.flush_until(deadline)
                raise
            else:
                return self.flush_until(deadline)

    def _await(self, event: int, deadline: float) -> None:
        """TimeoutError."""
        poll = select.poll()
        poll.register(self.sock, event)
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError

    # What comes

    def receive(self) -> None:
        """Once, without waiting: BlockingIOError."""
        count = self.sock.recv_into(self._buffer)
        self._come.write(self._buffer[:count])
        if len(self.opening) < 8:
            self.opening += bytes(self._buffer[: min(count, 8)])
        self.has_ended = not count

    def open(self, buffer: memoryview) -> int:
        """Decrypts what was received; bytes, 0 if there is no whole record, or the end."""
        filled = 0
        with contextlib.suppress(ssl.SSLWantReadError):
            while filled < len(buffer):
                count = self.tls.read(len(buffer) - filled, buffer[filled:])
                if not count:
                    self.has_ended = True
                    break
                filled += count
        return filled

    # What goes

    @property
    def is_sending(self) -> bool:
        """Something waits to be flushed."""
        return bool(self._sealed or self._go.pending)

    def seal(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self.tls.write(rest) :]

    def flush(self) -> bool:
        """Whether nothing is left to be sent."""
        while self.is_sending:
            if not self._sealed:
                self._sealed = memoryview(self._go.read())
            try:
                self._sealed = self._sealed[self.sock.send(self._sealed) :]
            except BlockingIOError:
                return False
        return True

    def flush_until(self, deadline: float) -> None:
        """TimeoutError."""
        while not self.flush():
            self._await(select.POLLOUT, deadline)

    # The end

    def notify(self) -> None:
        """close_notify goes out with what follows."""
        with contextlib.suppress(ssl.SSLError):  # it wants the peer's answer
            self.tls.unwrap()

    def linger(self) -> None:
        """Sends what there is, and nothing more; the peer has a moment to take it."""
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):  # the peer may be as far
            self.flush()
            self.sock.shutdown(socket.SHUT_WR)
            while not self.has_ended:
                self._await(select.POLLIN, deadline)
                self.has_ended = not self.sock.recv_into(self._buffer)
