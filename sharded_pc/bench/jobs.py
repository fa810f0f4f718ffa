"""What the sender's process sends: a recording over one connection, or packets over several.

Each has the same steps: open() up to the set-up's end, send() all pages, finish(); `ends` knows the
message on the return path with which all pages are in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sharded_pc.bench.packets import REACHED, Packets
from sharded_pc.wire.return_path import Pong, Shut

MOST_AT_ONCE = 1 << 30
"""sendfile(2) takes less than 2 GiB."""
Connect = Callable[[], socket.socket]


class Job(Protocol):
    """Pickled; `main` is the main channel, connect() makes another, which is closed in the end.
    OSError."""

    def ends(self, message: object) -> bool: ...
    def open(self, main: socket.socket, connect: Connect) -> None: ...
    def send(self) -> None: ...
    def finish(self) -> None: ...


@dataclasses.dataclass(slots=True)
class Whole:
    """A recording; the set-up section ends at `setup_end`."""

    path: str
    setup_end: int
    _main: socket.socket | None = None

    def ends(self, message: object) -> bool:
        return isinstance(message, Shut)

    def open(self, main: socket.socket, connect: Connect) -> None:
        self._main = main
        _send(main, self.path, 0, self.setup_end)

    def send(self) -> None:
        assert self._main is not None
        _send(self._main, self.path, self.setup_end, os.stat(self.path).st_size)

    def finish(self) -> None:
        pass


@dataclasses.dataclass(slots=True)
class Channels:
    """Packets, each channel on a thread of its own."""

    packets: Packets
    _main: socket.socket | None = None
    _channels: list[socket.socket] = dataclasses.field(default_factory=list)

    def ends(self, message: object) -> bool:
        return message == Pong(REACHED)

    def open(self, main: socket.socket, connect: Connect) -> None:
        self._main = main
        for opening in self.packets.openings:
            self._channels.append(connect())
            self._channels[-1].sendall(opening)
        main.sendall(self.packets.head)

    def send(self) -> None:
        errors: list[OSError] = []
        threads = [
            threading.Thread(target=self._send, args=(*each, errors))
            for each in zip(self._channels, self.packets.spans, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert self._main is not None
        self._main.sendall(self.packets.meeting)

    def _send(self, sock: socket.socket, span: tuple[int, int], errors: list[OSError]) -> None:
        try:
            _send(sock, self.packets.path, *span)
        except OSError as error:
            errors.append(error)
            with contextlib.suppress(OSError):
                assert self._main is not None
                self._main.shutdown(socket.SHUT_RDWR)  # the others do not go on alone

    def finish(self) -> None:
        for sock, last in zip(self._channels, self.packets.lasts, strict=True):
            sock.sendall(last)
        assert self._main is not None
        self._main.sendall(self.packets.tail)


def _send(sock: socket.socket, path: str, start: int, end: int) -> None:
    with Path(path).open("rb") as file:
        while start < end:
            count = min(end - start, MOST_AT_ONCE)
            start += os.sendfile(sock.fileno(), file.fileno(), start, count)
