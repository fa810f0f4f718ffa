"""Who has a paused migration go on: reads events, says migrate-pause and migrate-recover."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from sharded_pc.address import Address, TcpAddress, UnixAddress
from sharded_pc.wire import writer
from tests.control import Control
from tests.receiver import Receiver

OVER = ("completed", "failed", "cancelled")
GONE = "gone"
"""It has closed its control socket, and did not say why."""
PAUSED = "postcopy-paused"
WAITS = "postcopy-recover-setup"
STEP_S = 15.0
AGAIN_S = 0.05
SILENT_S = 5.0
"""What came before the silence has been worked off by then."""


class Operator:
    """Of one receiver."""

    def __init__(self, receiver: Receiver, folder: Path, tcp: bool) -> None:
        self._receiver = receiver
        self._folder = folder
        self._tcp = tcp
        self._places = 0
        self._control = Control(receiver.control_path)

    def close(self) -> None:
        """A client that stays would keep the receiver waiting."""
        self._control.close()

    @property
    def status(self) -> str:
        return self._control.events[-1] if self._control.events else "setup"

    def hear(self, statuses: Sequence[str], timeout: float = STEP_S) -> str | None:
        """The status as soon as it is one of these, or one of the last there are; None in vain."""
        try:
            return self._control.hear_one_of((*statuses, *OVER), timeout)
        except ConnectionError:
            return self.status if self.status in OVER else GONE

    def wait_guests(self, count: int, timeout: float = STEP_S) -> None:
        """Until so many have attached, or it is over; AssertionError."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(ConnectionError):
            while (info := self._query())["sharded"]["guests"] < count:
                if info["status"] in OVER:
                    return
                assert time.monotonic() < deadline, f"no {count} guests after {timeout:g} s"
                time.sleep(0.002)

    def _query(self) -> dict:
        info = self._control.execute("query-migrate")
        assert isinstance(info, dict), f"query-migrate: {info}"
        return info

    def pause(self) -> None:
        """The wire is silent.  A migration whose guest does not run, nor begins to, is given up."""
        deadline = time.monotonic() + SILENT_S
        with contextlib.suppress(ConnectionError):
            while self.status not in OVER and time.monotonic() < deadline:
                if self._control.execute("migrate-pause") == {}:
                    return
                if self.hear((PAUSED, WAITS), AGAIN_S):
                    return
            if self.status not in OVER:
                self._control.execute("quit")

    def take_up(self) -> None:
        """A successor tells nobody that it is paused: it was from the start."""
        self._control.wait_status(PAUSED)
        self._control.events.append(PAUSED)

    def recover(self, mistakes: Sequence[str]) -> Address:
        """Where the source may come now."""
        for mistake in mistakes:
            getattr(self, f"_{mistake}")()
        return self._listen()

    def _listen(self) -> Address:
        self._places += 1
        uri = "tcp:127.0.0.1:0" if self._tcp else f"unix:{self._folder / f'r{self._places}'}"
        self._say(uri, "{}")
        if not self._tcp:
            return UnixAddress(uri[5:])
        found = self._receiver.stderr().rpartition("go on at tcp:127.0.0.1:")[2]
        return TcpAddress("127.0.0.1", int(found.split()[0]))

    def _say(self, uri: str, expected: str) -> None:
        answer = self._control.execute("migrate-recover", uri=uri)
        assert expected in str(answer), f"migrate-recover {uri} ({self.status}): {answer}"

    # What goes wrong

    def _nonsense(self) -> None:
        self._say("nonsense", "expected tcp:HOST:PORT")

    def _nowhere(self) -> None:
        self._say(f"unix:{self._folder}/no/where", "No such file")

    def _elsewhere(self) -> None:
        """Nobody will come there."""
        self._listen()

    def _stranger(self) -> None:
        """Begins a new migration there."""
        with contextlib.suppress(ConnectionError), dial(self._listen()) as sock:
            sock.sendall(writer.header() + writer.configuration("pc"))
            assert sock.recv(100) == b"", "it is sent away"

    def _knock(self) -> None:
        dial(self._listen()).close()


def dial(address: Address) -> socket.socket:
    """OSError."""
    if isinstance(address, TcpAddress):
        return socket.create_connection((address.host, address.port), STEP_S)
    assert isinstance(address, UnixAddress)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(STEP_S)
        sock.connect(address.path)
    except OSError:
        sock.close()
        raise
    return sock
