"""One connection that goes through a ChaosProxy: two pipes over two sockets, and its weather.

Nothing here waits: `wants()` says for what, and until when, `step()` does what can be done now.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Callable, Iterator

from sharded_pc.testing.faults import Fault, Kind, Way, Weather

BUFFER_BYTES = 1 << 16
FOR_EVER = float("inf")
_RST = struct.pack("ii", 1, 0)
"""struct linger: close at once"""


class Pipe:
    """One direction: what comes from `source` goes to `sink`, piece by piece."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, pieces: Iterator[tuple[int, float]]
    ) -> None:
        self.source, self.sink = source, sink
        self._pieces = pieces
        self._left = 0
        self._buffer = bytearray()
        self.sent = 0
        self.held_until = 0.0
        self.drains = False
        """behind a cut: what comes is thrown away, until the end comes"""
        self.is_over = False
        self._ended = False

    def wants(self, now: float) -> Iterator[tuple[socket.socket, int]]:
        if self.is_over or self.held_until > now:
            return
        if self._buffer:
            yield self.sink, select.POLLOUT
        if not self._ended and len(self._buffer) < BUFFER_BYTES:
            yield self.source, select.POLLIN

    def step(self, now: float, most: int | None) -> None:
        """Goes on with at most one piece, and at most `most` bytes.  ConnectionError."""
        if self.is_over or self.held_until > now:
            return
        self._fill()
        if self._buffer and not self._waits_for_piece(now):
            self._send(most)
        if self._ended and not self._buffer:
            self.is_over = True
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)

    def _fill(self) -> None:
        if self._ended or len(self._buffer) >= BUFFER_BYTES:
            return
        with contextlib.suppress(BlockingIOError):
            data = self.source.recv(BUFFER_BYTES - len(self._buffer))
            self._ended = not data
            if not self.drains:
                self._buffer += data

    def _waits_for_piece(self, now: float) -> bool:
        if self._left == 0:
            self._left, delay = next(self._pieces)
            self.held_until = now + delay
        return self.held_until > now

    def _send(self, most: int | None) -> None:
        end = self._left if most is None else min(self._left, most)
        with contextlib.suppress(BlockingIOError):
            count = self.sink.send(memoryview(self._buffer)[:end])
            del self._buffer[:count]
            self._left -= count
            self.sent += count

    def cut(self) -> None:
        """FIN behind what was sent; a close would be a reset while something is unread."""
        self._buffer.clear()
        self.drains, self.held_until = True, 0.0
        with contextlib.suppress(OSError):
            self.sink.shutdown(socket.SHUT_WR)


class Relay:
    """`near` is who connected, `far` whom it wanted.  `tell(fault)` hears what happens now."""

    def __init__(
        self,
        near: socket.socket,
        far: socket.socket,
        weather: Weather,
        tell: Callable[[Fault], None],
    ) -> None:
        self._sockets = (near, far)
        for sock in self._sockets:
            sock.setblocking(False)
        self.pipes = {
            Way.FORTH: Pipe(near, far, weather.pieces(Way.FORTH)),
            Way.BACK: Pipe(far, near, weather.pieces(Way.BACK)),
        }
        self._tell = tell
        self._faults = {
            way: sorted((f for f in weather.faults if f.counted is way), key=lambda f: f.at)
            for way in Way
        }
        self.is_closed = False

    def wants(self, now: float) -> Iterator[tuple[socket.socket, int]]:
        for pipe in self.pipes.values():
            yield from pipe.wants(now)

    def wakes(self, now: float) -> float:
        """When a pipe that is held goes on."""
        return min(max(pipe.held_until, now) if pipe.held_until > now else FOR_EVER
                   for pipe in self.pipes.values())  # fmt: skip

    def step(self, now: float) -> None:
        for way, pipe in self.pipes.items():
            self._meet(way, now)
            if self.is_closed:
                return
            try:
                pipe.step(now, self._until_fault(way))
            except OSError:  # one end was reset: so is the other
                self.reset()
                return
            self._meet(way, now)
        if all(pipe.is_over for pipe in self.pipes.values()):
            self.close()

    def _until_fault(self, way: Way) -> int | None:
        faults = self._faults[way]
        return faults[0].at - self.pipes[way].sent if faults else None

    def _meet(self, way: Way, now: float) -> None:
        """What is due now."""
        while not self.is_closed and self._until_fault(way) == 0:
            fault = self._faults[way].pop(0)
            self._tell(fault)  # before anybody can feel it, and ask
            self._happen(fault, now)

    def _happen(self, fault: Fault, now: float) -> None:
        match fault.kind:
            case Kind.STALL | Kind.SILENCE:
                until = FOR_EVER if fault.kind is Kind.SILENCE else now + fault.seconds
                for way in fault.ways:
                    self.pipes[way].held_until = max(until, self.pipes[way].held_until)
            case Kind.CUT:
                self.cut()
            case Kind.RESET:
                self.reset()

    def cut(self) -> None:
        """Nothing happens to it any more."""
        self._faults = {way: [] for way in Way}
        for pipe in self.pipes.values():
            pipe.cut()

    def reset(self) -> None:
        for sock in self._sockets:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
        self.close()

    def close(self) -> None:
        self.is_closed = True
        for sock in self._sockets:
            sock.close()
