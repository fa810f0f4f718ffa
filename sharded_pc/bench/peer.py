"""QEMU's own destination, which the product is compared with: one stopped process, driven by QMP.

with QemuPeer(["qemu-system-x86_64", "-m", "64", ...], folder) as peer:
    uri = peer.listen("unix:" + path)  # a source migrates there
    peer.wait("completed")
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sharded_pc.bench import usage
from sharded_pc.errors import GuestLost, HostError

START_SECONDS = 30.0
ANSWER_SECONDS = 30.0
POLL_SECONDS = 0.005
ENDED = ("completed", "failed", "cancelled")
"""Statuses that an incoming migration does not leave."""


class Qmp:
    """A QMP client that waits: one command at a time, events dropped."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(ANSWER_SECONDS)
            self._sock.connect(path)
            self._lines = self._sock.makefile("rb")
            self._lines.readline()  # the greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._sock.close()
            raise

    def execute(self, command: str, **arguments: object) -> object:
        """The command's return value; GuestLost if it is refused or QEMU has gone."""
        request = {"execute": command, "arguments": arguments}
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\r\n")
            while line := self._lines.readline():
                answer = json.loads(line)
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise GuestLost(f"QEMU refuses {command}: {answer['error']['desc']}")
        except OSError as error:
            raise GuestLost(f"QEMU's monitor failed at {command}: {error}") from error
        raise GuestLost(f"QEMU closed its monitor at {command}")

    def close(self) -> None:
        with contextlib.suppress(AttributeError):  # connect() failed
            self._lines.close()
        self._sock.close()


class QemuPeer:
    """A QEMU that waits for a migration with its guest stopped; a context manager, ends killed.

    `arguments` is its command line, program first, as the source's but without -incoming, -S and
    -qmp; without `incoming` it waits for nothing and can be a source.  Its files stand in `folder`,
    whose path must be short enough for sockets.  HostError if it cannot be started, GuestLost
    whenever it has ended or refuses.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        name: str = "qemu",
        stopped: bool = True,
        incoming: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._monitor, self._stderr = folder / f"{name}.qmp", folder / f"{name}.stderr"
        self._command = [*arguments, *(["-incoming", "defer"] if incoming else [])]
        self._command += ["-S"] if stopped else []
        self._command += ["-qmp", f"unix:{self._monitor},server=on,wait=off"]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Qmp | None = None

    def __enter__(self) -> QemuPeer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> QemuPeer:
        """Returns when its monitor answers."""
        self._monitor.unlink(missing_ok=True)
        try:
            with self._stderr.open("wb") as err:
                self._process = subprocess.Popen(
                    self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=err,
                    stderr=err, preexec_fn=usage.dies_with_us(signal.SIGKILL),
                )  # fmt: skip
        except OSError as error:
            raise HostError(f"start QEMU {self._command[0]!r}: {error.strerror}") from error
        try:
            self._qmp = self._connect()
        except BaseException:
            self.close()
            raise
        return self

    def _connect(self) -> Qmp:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._check_alive()
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return Qmp(str(self._monitor))
            time.sleep(POLL_SECONDS)
        raise HostError(f"QEMU opened no monitor in {START_SECONDS:.0f} s")

    def _check_alive(self) -> None:
        assert self._process is not None, "not started"
        if (code := self._process.poll()) is not None:
            said = self._stderr.read_text(errors="replace").strip().splitlines()
            raise GuestLost(f"QEMU ended with {code}: {said[-1] if said else 'it said nothing'}")

    def qmp(self, command: str, **arguments: object) -> object:
        """Any command's return value; `_` in argument names stands for `-`."""
        assert self._qmp is not None, "not started"
        dashed = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._qmp.execute(command, **dashed)
        except GuestLost:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)  # its own last words say more
            self._check_alive()
            raise

    def listen(self, uri: str, *, postcopy: bool = True) -> str:
        """Waits for a migration at `uri`; returns the address with TCP's real port."""
        wanted = [{"capability": "postcopy-ram", "state": postcopy}]
        self.qmp("migrate-set-capabilities", capabilities=wanted)
        self.qmp("migrate-incoming", uri=uri)
        if not uri.startswith("tcp:"):
            return uri
        (where,) = self.migration()["socket-address"]
        return f"tcp:{where['host']}:{where['port']}"

    def migration(self) -> dict:
        """As `query-migrate`: {"status": "postcopy-active", ...}."""
        answer = self.qmp("query-migrate")
        assert isinstance(answer, dict)
        return answer

    def wait(self, *statuses: str, timeout: float = 60.0) -> dict:
        """Polls until the migration has one of `statuses`; query-migrate's answer.  GuestLost if it
        ends otherwise.  Polling costs QEMU CPU time: not for while something is measured."""
        deadline = time.monotonic() + timeout
        while (status := (info := self.migration()).get("status", "none")) not in statuses:
            if status in ENDED or time.monotonic() > deadline:
                raise GuestLost(f"QEMU's migration is {status}, not {' or '.join(statuses)}")
            time.sleep(POLL_SECONDS)
        return info

    def cpu_seconds(self) -> float:
        """Used until now by all its threads."""
        try:
            return usage.cpu_seconds(self.pid)
        except ProcessLookupError:
            self._check_alive()
            raise GuestLost("QEMU has ended") from None

    def memory(self) -> dict[str, int]:
        """Bytes, as usage.memory."""
        return usage.memory(self.pid)

    def cont(self) -> None:
        """Lets the guest run."""
        self.qmp("cont")

    def guest_memory(self, address: int, length: int) -> bytes:
        """Guest-physical memory by `pmemsave`; what is not RAM, and the VGA hole, reads zeros."""
        file = self._monitor.with_suffix(".pmemsave")
        try:
            self.qmp("pmemsave", val=address, size=length, filename=str(file))
            return file.read_bytes()
        finally:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Kills it and removes its files.  May be called again."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for path in (self._monitor, self._stderr):
            path.unlink(missing_ok=True)
