"""``sharded-pc run`` as a real process, with the QEMU it resumes, for tests.

A ``Destination`` is that QEMU: its command line is what stands behind ``--``, and it is driven over
a QMP socket of its own like any ``QemuVm``, but started and ended by the receiver. A ``Runner`` is
the receiver; it leaves no file in its folder for temporary files either.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharded_pc.observe.view import ReceiverView
from tests.qemu import TIMEOUT_S, wait_until
from tests.qemu.vm import QemuVm
from tests.receiver import END_S, Outcome, Receiver


class Destination(QemuVm):
    """The QEMU of a ``Runner``. Give it what the source was given."""

    runner: Runner
    front: tuple[str, ...] = ()
    """what stands in front of it: a shell, `nice`"""

    def start(self) -> Destination:
        """Connects to its QMP."""
        self.wait_until(self._connect, "the destination's QMP")
        return self

    def kill(self) -> None:
        """Drops the connection; the process is the runner's."""
        if self._qmp:
            self._qmp.close()
            self._qmp = None

    @property
    def pid(self) -> int:
        (pid,) = [pid for pid in self.runner.processes() if _program(pid).startswith("qemu-system")]
        return pid

    def alive(self) -> bool:
        return self.runner.alive()

    def wait_exit(self, timeout: float = TIMEOUT_S) -> int:
        return self.runner.finish(timeout).exit_code

    def stderr(self) -> str:
        return self.runner.stderr()

    def userfaultfds(self) -> list[str]:
        folder, found = Path(f"/proc/{self.pid}/fd"), []
        for at in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found += [at.name] if "userfaultfd" in os.readlink(at) else []
        return found

    def registered_bytes(self) -> int:
        """How much of its memory is registered with a userfaultfd for missing pages."""
        total = start = end = 0
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                start, end = (int(text, 16) for text in head.groups())
            elif line.startswith("VmFlags:") and "um" in line.split():
                total += end - start
        return total


class Runner(Receiver):
    """One ``sharded-pc run``; ``guest`` is its QEMU, or any command line that stands for one."""

    word = "run"

    def __init__(
        self, folder: Path, name: str, guest: Destination | Sequence[str], *options: str,
        incoming: str | None = None, environment: dict[str, str] | None = None,
        program: Sequence[str] = (), **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(folder, name, incoming, *options, keep=False, **more)
        self.guest = guest
        self.program = program or self.program
        self._temporary = Path(tempfile.mkdtemp(prefix="run-"))  # tmp_path is long for sockets
        self._environment = environment or {}
        if isinstance(guest, Destination):
            guest.runner = self
            self._environment = {**dict(guest.binary.environment), **self._environment}

    def behind_options(self) -> list[str]:
        guest = self.guest
        if isinstance(guest, Destination):
            return ["--", *guest.front, *guest.command()]
        return ["--", *guest]

    def environment(self) -> dict[str, str]:
        ours = {"TMPDIR": str(self._temporary)}
        return {**super().environment(), **ours, **self._environment}

    def wait_info(self, timeout: float = END_S) -> dict[str, Any]:
        """Waits for the JSON object, which comes when the migration ends and not the guest."""

        def printed() -> bool:
            if not self.alive() and "\n" not in self._read("stdout"):
                raise self.error(f"ended with {self._started().wait()} without a JSON object")
            return "\n" in self._read("stdout")

        wait_until(printed, f"{self.name}'s JSON", timeout)
        return json.loads(self._read("stdout"))

    def look(self) -> dict[str, Any]:
        """Its figures at this moment, as another process sees them."""
        with ReceiverView(self.name) as view:
            return view.info()

    def spawn(self) -> None:
        """Starts it and waits for nothing."""
        writing = os.open(os.devnull, os.O_WRONLY)
        try:
            self._spawn(writing)
        finally:
            os.close(writing)

    def run_to_end(self, timeout: float = END_S) -> Outcome:
        """For a command that is to fail before a source may connect."""
        reading, writing = os.pipe()
        try:
            self._spawn(writing)
            return self.finish(timeout)
        finally:
            os.close(reading)
            os.close(writing)

    def close(self) -> None:
        if isinstance(self.guest, Destination):
            self.guest.kill()
        try:
            self._end_guest()
            super().close()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _end_guest(self) -> None:
        """Of a test that failed: QEMU outlives a killed parent, as it must."""
        if self.alive():
            self._started().terminate()
            deadline = time.monotonic() + END_S
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.01)

    def _check_end(self, outcome: Outcome) -> None:
        super()._check_end(outcome)
        if left := sorted(os.listdir(self._temporary)):
            raise self.error(f"left {left} in {self._temporary}")


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""
