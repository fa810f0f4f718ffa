"""One connection's bytes between its TLS and its plain end, on one thread.

Each way has one buffer, and is read only when that is empty: who does not take what has come holds
the peer back, as without TLS.

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

from sharded_pc.transport.tls.wire import CHUNK_BYTES, TlsWire

FLUSH_SECONDS = 5.0
"""How long the rest may take to go out once nobody is left at the plain end."""


class Pump:
    """`wire` and `plain`, which is made non-blocking, are taken over."""

    def __init__(self, wire: TlsWire, plain: socket.socket) -> None:
        self._wire, self._plain = wire, plain
        plain.setblocking(False)
        self._clear_buffer = memoryview(bytearray(CHUNK_BYTES))
        self._clear = self._clear_buffer[:0]
        self._plain_ended = False
        self._is_told = False
        self.on_end: Callable[[str | None], None] = lambda why: None
        """called once, before the plain end sees the end"""

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
                self._wire.flush()  # an alert
            why = _reason(error)
        self._tell_end(why)
        return why

    def _tell_end(self, why: str | None) -> None:
        if not self._is_told:
            self._is_told = True
            self.on_end(why)

    def close(self) -> None:
        for sock in (self._plain, self._wire.sock):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # others may have it open
            sock.close()

    def _take_in(self) -> bool:
        """From the wire to the plain end; whether anything moved."""
        if self._clear:
            return self._deliver()
        if self._wire.has_ended:
            return False
        filled = self._wire.open(self._clear_buffer)
        self._clear = self._clear_buffer[:filled]
        if filled:
            self._deliver()
            return True
        return self._wire_ended() or self._read_wire()

    def _read_wire(self) -> bool:
        try:
            self._wire.receive()
        except BlockingIOError:
            return False
        self._wire_ended()
        return True

    def _wire_ended(self) -> bool:
        """It has: that is the end of what the plain end gets."""
        if self._wire.has_ended:
            self._tell_end(None)
            with contextlib.suppress(OSError):
                self._plain.shutdown(socket.SHUT_WR)
        return self._wire.has_ended

    def _deliver(self) -> bool:
        try:
            count = self._plain.send(self._clear)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):  # who would read it has gone
            count = len(self._clear)
        self._clear = self._clear[count:]
        if not self._clear:
            self._wire_ended()
        return True

    def _send_out(self) -> bool:
        """From the plain end to the wire; whether anything moved."""
        if self._wire.is_sending:
            return self._wire.flush()
        try:
            data = self._plain.recv(CHUNK_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # closed with unread bytes
            data = b""
        if not data:
            self._plain_ended = True
        self._wire.seal(data)
        self._wire.flush()
        return True

    def _wait(self) -> None:
        sending = self._wire.is_sending
        wire = select.POLLOUT if sending else 0
        if not self._clear and not self._wire.has_ended:
            wire |= select.POLLIN
        plain = 0 if sending else select.POLLIN
        if self._clear:
            plain |= select.POLLOUT
        poll = select.poll()
        for sock, events in ((self._wire.sock, wire), (self._plain, plain)):
            if events:  # without, it would still tell again and again that it was hung up
                poll.register(sock, events)
        poll.poll()

    def _say_goodbye(self) -> None:
        """Nobody is left at the plain end."""
        self._wire.flush_until(time.monotonic() + FLUSH_SECONDS)
        self._wire.notify()
        self._wire.linger()


def _reason(error: OSError) -> str | None:
    """None: as the end of a plain connection, which has no reason either."""
    match error:
        case ssl.SSLError():
            return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
        case ConnectionResetError() | BrokenPipeError():
            return None
    return error.strerror or "its rest was not taken in time"
