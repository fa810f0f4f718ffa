"""Sends signals to the workers of a receiver."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

from sharded_pc.observe.view import ReceiverView
from tests.chaos.plan import Kill
from tests.receiver import MARK


class Killer:
    """`sent` counts signals that found their process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._timers: list[threading.Timer] = []
        self.sent: dict[str, int] = {"KILL": 0, "SEGV": 0, "STOP": 0}

    def kill(self, kill: Kill) -> None:
        """Whoever is the worker of the shard now, if there is one."""
        with contextlib.suppress(OSError), ReceiverView(self._name) as view:
            pid = view.info()["sharded"]["shards"][kill.shard]["pid"]
            self._signal(pid, kill.signal)
            self.sent[kill.signal] += 1
            if kill.stopped_s is not None:
                timer = threading.Timer(kill.stopped_s, self._go_on, (pid,))
                self._timers.append(timer)
                timer.start()

    def _go_on(self, pid: int) -> None:
        with contextlib.suppress(OSError):  # it was replaced meanwhile
            self._signal(pid, "CONT")

    def _signal(self, pid: int, name: str) -> None:
        """Only to a process of this receiver: numbers are used again.  OSError."""
        with contextlib.closing(_PidFd(pid)) as process:
            mark = f"{MARK}={self._name}".encode()
            if mark not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                raise ProcessLookupError(pid)
            signal.pidfd_send_signal(process.fd, signal.Signals[f"SIG{name}"])

    def end(self) -> None:
        for timer in self._timers:
            timer.cancel()
            timer.join()


class _PidFd:
    def __init__(self, pid: int) -> None:
        self.fd = os.pidfd_open(pid)

    def close(self) -> None:
        os.close(self.fd)
