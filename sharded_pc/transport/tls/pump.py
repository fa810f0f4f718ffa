"""One connection's bytes between its TLS and its plain end, on one thread.

The SSL object has one owner and touches no socket: what it answers by itself, key updates and
alerts, goes out with the rest.  Each way has one buffer, and is read only when that is empty: who
does not take what has come holds the peer back, as without TLS.

====================================  ============================================================
the wire's end, with close_notify     end of the stream on the plain end; the other way stays open
or without: as of a plain connection
reset, timeout, a TLS error           both ways end; the reason is told
the plain end's end                   close_notify, and the end of the connection
====================================  ============================================================
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable

CHUNK_BYTES = 256 << 10
"""Many TLS records (16 KiB): one read and one write for all of them."""
FLUSH_SECONDS = 5.0
"""How long the rest may take to go out once nobody is left at the plain end."""
LINGER_SECONDS = 1.0
"""How long what still comes is read and thrown away then: closing with unread bytes resets the
connection, and the peer would lose our last words."""


class ClosedEarly(Exception):
    """The peer closed the connection in the middle of the handshake."""


class Pump:
    """`wire` carries TLS; both sockets are taken over, and made non-blocking."""

    def __init__(
        self,
        wire: socket.socket,
        plain: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool = True,
        server_hostname: str | None = None,
    ) -> None:
        self._wire, self._plain = wire, plain
        for sock in (wire, plain):
            sock.setblocking(False)
        self._come, self._go = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._come, self._go, server_side, server_hostname)
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._clear_buffer = memoryview(bytearray(CHUNK_BYTES))
        self._clear = self._clear_buffer[:0]
        self._sealed = memoryview(b"")
        self._wire_ended = self._plain_ended = False
        self._is_told = False
        self.on_end: Callable[[str | None], None] = lambda why: None
        """called once, before the plain end sees the end"""
        self.opening = b""
        """the first bytes of the peer"""

    # The handshake

    def handshake(self, seconds: float) -> None:
        """TimeoutError, ClosedEarly, OSError; ssl.SSLError once the peer was told."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush_until(deadline)
                self._await(self._wire, select.POLLIN, deadline)
                if not self._receive():
                    raise ClosedEarly from None
            except ssl.SSLError:
                self._flush_until(deadline)
                raise
            else:
                return self._flush_until(deadline)

    def _flush_until(self, deadline: float) -> None:
        while not self._flush():
            self._await(self._wire, select.POLLOUT, deadline)

    def _await(self, sock: socket.socket, event: int, deadline: float) -> None:
        """TimeoutError."""
        poll = select.poll()
        poll.register(sock, event)
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError

    # Afterwards

    def run(self) -> str | None:
        """Until both ways have ended; what broke the wire, None if it was closed."""
        why = None
        try:
            while not self._plain_ended:
                if not (self._take_in() | self._send_out()):
                    self._wait()
            self._tell_end(None)
            self._say_goodbye()
        except OSError as error:  # ssl.SSLError is one:
            with contextlib.suppress(OSError):
                self._flush()  # an alert
            why = _reason(error)
        self._tell_end(why)
        return why

    def _tell_end(self, why: str | None) -> None:
        if not self._is_told:
            self._is_told = True
            self.on_end(why)

    def close(self) -> None:
        for sock in (self._plain, self._wire):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # others may have it open
            sock.close()

    def _take_in(self) -> bool:
        """From the wire to the plain end; whether anything moved."""
        if self._clear:
            return self._deliver()
        if self._wire_ended:
            return False
        if self._open():
            self._deliver()
            return True
        if self._wire_ended:  # by a close_notify
            self._end_plain()
            return True
        return self._read_wire()

    def _read_wire(self) -> bool:
        try:
            if not self._receive():
                self._end_plain()
        except BlockingIOError:
            return False
        return True

    def _receive(self) -> bool:
        """Once, without waiting; false at the end."""
        count = self._wire.recv_into(self._buffer)
        self._come.write(self._buffer[:count])
        if len(self.opening) < 8:
            self.opening += bytes(self._buffer[: min(count, 8)])
        return count > 0

    def _open(self) -> int:
        """Decrypts what has come; bytes, 0 if there is no whole record."""
        filled = 0
        with contextlib.suppress(ssl.SSLWantReadError):
            while filled < CHUNK_BYTES:
                count = self.tls.read(CHUNK_BYTES - filled, self._clear_buffer[filled:])
                if not count:
                    self._wire_ended = True
                    break
                filled += count
        self._clear = self._clear_buffer[:filled]
        return filled

    def _deliver(self) -> bool:
        try:
            count = self._plain.send(self._clear)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):  # who would read it has gone
            count = len(self._clear)
        self._clear = self._clear[count:]
        if not self._clear and self._wire_ended:
            self._end_plain()
        return True

    def _end_plain(self) -> None:
        self._wire_ended = True
        self._tell_end(None)
        with contextlib.suppress(OSError):
            self._plain.shutdown(socket.SHUT_WR)

    def _send_out(self) -> bool:
        """From the plain end to the wire; whether anything moved."""
        if self._sealed or self._go.pending:
            return self._flush()
        try:
            data = self._plain.recv(CHUNK_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # closed with unread bytes
            data = b""
        if not data:
            self._plain_ended = True
        self._seal(data)
        self._flush()
        return True

    def _seal(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self.tls.write(rest) :]

    def _flush(self) -> bool:
        """Whether nothing is left to be sent."""
        while self._sealed or self._go.pending:
            if not self._sealed:
                self._sealed = memoryview(self._go.read())
            try:
                self._sealed = self._sealed[self._wire.send(self._sealed) :]
            except BlockingIOError:
                return False
        return True

    def _wait(self) -> None:
        sending = bool(self._sealed or self._go.pending)
        wire = select.POLLOUT if sending else 0
        if not self._clear and not self._wire_ended:
            wire |= select.POLLIN
        plain = 0 if sending else select.POLLIN
        if self._clear:
            plain |= select.POLLOUT
        poll = select.poll()
        for sock, events in ((self._wire, wire), (self._plain, plain)):
            if events:  # without, it would still tell again and again that it was hung up
                poll.register(sock, events)
        poll.poll()

    def _say_goodbye(self) -> None:
        """Nobody is left at the plain end."""
        self._flush_until(time.monotonic() + FLUSH_SECONDS)
        with contextlib.suppress(ssl.SSLError):  # it wants the peer's answer
            self.tls.unwrap()
        self.linger()

    def linger(self) -> None:
        """Sends what there is, and nothing more; the peer has a moment to take it."""
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):  # the peer may be as far
            self._flush()
            self._wire.shutdown(socket.SHUT_WR)
            while not self._wire_ended:
                self._await(self._wire, select.POLLIN, deadline)
                self._wire_ended = not self._wire.recv_into(self._buffer)


def _reason(error: OSError) -> str | None:
    """None: as the end of a plain connection, which has no reason either."""
    match error:
        case ssl.SSLError():
            return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
        case ConnectionResetError() | BrokenPipeError():
            return None
    return error.strerror or "its rest was not taken in time"
