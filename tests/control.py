"""A client of a receiver's control socket (QMP), for tests."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

from tests.qemu import wait_until

WAIT_S = 20.0


class Control:
    """A client of the control socket that keeps the events it hears."""

    def __init__(self, path: str | Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(WAIT_S)
        self._sock.connect(str(path))
        self._file = self._sock.makefile("r", encoding="utf-8")
        self.events: list[str] = []
        json.loads(self._file.readline())
        assert self.execute("qmp_capabilities") == {}

    def execute(self, command: str, **arguments: object) -> object:
        """Its answer, {} or an error's text."""
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._sock.sendall(json.dumps(message).encode())
        while True:
            answer = json.loads(self._file.readline())
            if "event" in answer:
                self._note(answer)
                continue
            return answer["return"] if "return" in answer else answer["error"]["desc"]

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

    def hear(self) -> None:
        """Everything up to its end."""
        with contextlib.suppress(ConnectionError):
            for line in self._file:
                self._note(json.loads(line))

    def close(self) -> None:
        self._file.close()
        self._sock.close()
