"""Our receiver as a user starts it, a process of its own, to be measured from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from qemu.qmp import QMPClient, QMPError

from sharded_pc.bench import usage
from sharded_pc.errors import GuestLost, HostError

START_SECONDS = 30.0
END_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """How a receiver ended.  `cpu_seconds`: of all its processes, their start included."""

    exit_code: int
    info: dict | None
    """--json's object, None if it printed none"""
    cpu_seconds: float
    stderr: str


class Product:
    """`sharded-pc receive ADDRESS` (None: `--resume` of a dead one), or `run` if `qemu` is a
    destination's command line; a context manager.  HostError if it does not come to listen,
    GuestLost if it ends too early."""

    def __init__(
        self,
        folder: Path,
        name: str,
        address: str | None,
        *options: str,
        workers: int = 2,
        placement: str = "copy",
        qemu: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.attach_path = str(folder / f"{name}.attach")
        self.control_path = str(folder / f"{name}.control")
        self._stdout, self._stderr = folder / f"{name}.stdout", folder / f"{name}.stderr"
        self._command = [sys.executable, "-m", "sharded_pc", "run" if qemu else "receive"]
        self._command += ["--resume", name] if address is None else [address]
        self._command += ["--control", self.control_path] if "--control" not in options else []
        self._command += ["--name", name, "--workers", str(workers), "--placement", placement]
        self._command += ["--attach", self.attach_path, "--json", "--no-progress", *options]
        self._tail = ["--", *qemu] if qemu else []
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._cpu_seconds = 0.0
        self.uri = ""
        """where a source migrates to, with TCP's real port; "" after --resume"""

    def __enter__(self) -> Product:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> Product:
        """Returns when a source may connect."""
        reading, writing = os.pipe()
        try:
            self._spawn(writing)
            os.close(writing)
            self._wait_listening(reading)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(reading)
        return self

    def _spawn(self, status_fd: int) -> None:
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self._process = subprocess.Popen(
                [*self._command, "--status-fd", str(status_fd), *self._tail],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                pass_fds=[status_fd], preexec_fn=usage.dies_with_us(signal.SIGTERM),
            )  # fmt: skip

    def _wait_listening(self, status_fd: int) -> None:
        ready, _, _ = select.select([status_fd], [], [], START_SECONDS)
        if not ready or not os.read(status_fd, 1):
            raise HostError(f"the receiver does not listen: {self.last_words()}")
        found = re.search(r"^(?:listening on|reading from) (\S+)$", self._said(), re.MULTILINE)
        self.uri = found[1] if found is not None else ""

    def _said(self) -> str:
        return self._stderr.read_text(errors="replace")

    def last_words(self) -> str:
        """The last line on its standard error."""
        lines = self._said().strip().splitlines()
        return lines[-1].removeprefix("sharded-pc: ") if lines else "it said nothing"

    def alive(self) -> bool:
        return self._process is not None and not self._reaped(os.WNOHANG)

    def pids(self) -> list[int]:
        """All its processes now, its QEMU included."""
        return usage.tree(self.pid)

    def cpu_seconds(self) -> float:
        """Used until now by all its living processes."""
        return usage.tree_cpu_seconds(self.pids())

    def finish(self, timeout: float = END_SECONDS) -> Ending:
        """Waits for its end by itself."""
        deadline = time.monotonic() + timeout
        while self.alive():
            if time.monotonic() > deadline:
                raise GuestLost(f"the receiver still runs after {timeout:.0f} s")
            time.sleep(0.005)
        code = self._process.returncode
        return Ending(code, self.info(), self._cpu_seconds, self._said())

    def info(self) -> dict | None:
        """What --json has printed; with `run` it is there before the end."""
        text = self._stdout.read_text()
        return json.loads(text) if text.endswith("\n") else None

    async def execute(self, command: str, **arguments: object) -> object:
        """A command on its control socket; HostError with its answer if that is an error."""
        client = QMPClient("bench")
        try:
            await client.connect(self.control_path)
            return await client.execute(command, arguments or None)
        except (QMPError, OSError) as error:
            raise HostError(f"{command}: {error}") from error
        finally:
            with contextlib.suppress(QMPError, EOFError, OSError):
                await client.disconnect()

    def _reaped(self, flags: int) -> bool:
        """Whether it has ended.  By wait4(): only that tells what its children used as well."""
        process = self._process
        assert process is not None
        if process.returncode is None:
            pid, status, used = os.wait4(process.pid, flags)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                self._cpu_seconds = used.ru_utime + used.ru_stime
        return process.returncode is not None

    def close(self) -> None:
        """Ends it in order, by force if need be; removes its files.  May be called again."""
        if self._process is not None and self.alive():
            self._process.terminate()
            with contextlib.suppress(GuestLost):
                self.finish(timeout=10)
        if self._process is not None and self.alive():
            self._process.kill()
            self._reaped(0)
        for path in (self._stdout, self._stderr):
            path.unlink(missing_ok=True)
