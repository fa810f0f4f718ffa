"""A client of a receiver's control socket (QMP), for tests."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Container
from pathlib import Path

from tests.qemu import wait_until

WAIT_S = 20.0


class Control:
    """Keeps the events it hears.  ConnectionError when the receiver has closed the socket."""

    def __init__(self, path: str | Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(WAIT_S)
        self._sock.connect(str(path))
        self._unread = b""
        self.events: list[str] = []
        assert "QMP" in self._message(WAIT_S)
        assert self.execute("qmp_capabilities") == {}

    def execute(self, command: str, **arguments: object) -> object:
        """Its answer, {} or an error's text."""
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._sock.sendall(json.dumps(message).encode())
        while "event" in (answer := self._message(WAIT_S)):
            self._note(answer)
        return answer["return"] if "return" in answer else answer["error"]["desc"]

    def _message(self, timeout: float) -> dict:
        """TimeoutError leaves what has come of it for the next call."""
        while b"\n" not in self._unread:
            self._sock.settimeout(timeout)
            data = self._sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the receiver closed its control socket")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _note(self, event: dict) -> None:
        assert event["event"] == "MIGRATION"
        self.events.append(event["data"]["status"])

    def wait_status(self, status: str) -> dict:
        """query-migrate's answer once it says so."""
        found: dict = {}

        def says() -> bool:
            found.update(self.execute("query-migrate"))
            return found["status"] == status

        wait_until(says, f"status {status}", WAIT_S)
        return found

    def hear_one_of(self, statuses: Container[str], timeout: float) -> str | None:
        """The last status that was told, as soon as it is one of these; None after `timeout`."""
        deadline = time.monotonic() + timeout
        while not (self.events and self.events[-1] in statuses):
            try:
                self._note(self._message(max(deadline - time.monotonic(), 0.001)))
            except TimeoutError:
                return None
        return self.events[-1]

    def hear(self) -> None:
        """Everything up to its end."""
        with contextlib.suppress(ConnectionError):
            while True:
                self._note(self._message(WAIT_S))

    def close(self) -> None:
        self._sock.close()
