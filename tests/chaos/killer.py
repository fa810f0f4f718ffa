"""Sends signals to the workers of a receiver."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

from sharded_pc.observe.view import ReceiverView
from tests.chaos.plan import ALL, COORDINATOR, EVERYTHING, SPARE, Kill
from tests.receiver import MARK, Receiver


class Killer:
    """`sent` counts signals that found their process."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._name = receiver.name
        self._timers: list[threading.Timer] = []
        self.sent: dict[str, int] = {"KILL": 0, "SEGV": 0, "STOP": 0}
        self.has_killed_receiver = False
        self.coordinators = 0

    def receive_by(self, receiver: Receiver) -> None:
        """A successor."""
        self._receiver = receiver
        self.has_killed_receiver = False

    def kill(self, kill: Kill) -> None:
        """Whoever it is now, if there is one."""
        if kill.whom in (COORDINATOR, EVERYTHING) and kill.signal != "STOP":
            self.has_killed_receiver = True
            self.coordinators += 1
        for pid in self._pids(kill.whom):
            with contextlib.suppress(OSError):
                self._signal(pid, kill.signal)
                self.sent[kill.signal] += 1
            if kill.stopped_s is not None:
                timer = threading.Timer(kill.stopped_s, self._go_on, (pid,))
                self._timers.append(timer)
                timer.start()

    def _pids(self, whom: int | str) -> list[int]:
        if whom == COORDINATOR:
            return [self._receiver.pid]
        if whom == EVERYTHING:
            return self._receiver.processes()
        try:
            with ReceiverView(self._name) as view:
                pids = [shard["pid"] for shard in view.info()["sharded"]["shards"]]
        except OSError:
            return []  # it is not there yet, or not any more
        if whom == SPARE:
            others = {self._receiver.pid, *pids}
            return [pid for pid in self._receiver.processes()
                    if pid not in others and not _is_tracker(pid)]  # fmt: skip
        return pids if whom == ALL else [pids[whom]]

    def let_go_on(self) -> None:
        """Who is stopped does not notice that its receiver is gone for good."""
        for pid in self._receiver.processes():
            self._go_on(pid)

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


def _is_tracker(pid: int) -> bool:
    """multiprocessing's, or somebody who has just ended."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


class _PidFd:
    def __init__(self, pid: int) -> None:
        self.fd = os.pidfd_open(pid)

    def close(self) -> None:
        os.close(self.fd)
