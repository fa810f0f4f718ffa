"""One QEMU process, source or destination of a migration, driven from a test.

Every wait has a timeout and raises ``VmError`` with all that QEMU and the guest have said. Leaving
the ``with`` block kills the process by its pid, always; so does the death of the thread that
started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, QMPClient, QMPError

from tests.qemu import TIMEOUT_S, T, VmError, WaitTimeout, wait_until
from tests.qemu.backports import QemuBinary, distribution_qemu
from tests.qemu.guest_image import guest_args

UNIX_PATH_MAX = 107  # sizeof(sun_path) - 1
ENDED = {"completed", "failed", "cancelled"}  # a migration leaves none of these by itself
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


class QmpConnection:
    """The client of ``qemu.qmp``, its event loop in a thread so that any thread can call it."""

    def __init__(self, path: Path, timeout: float = TIMEOUT_S) -> None:
        self._client = QMPClient(path.name)
        self._pending: list[dict[str, Any]] = []  # events nobody asked for yet, oldest first
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._call(self._client.connect(str(path)), timeout)
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any], timeout: float = TIMEOUT_S) -> Any:
        """The command's return value; ``qemu.qmp.ExecuteError`` if QEMU refuses it."""
        return self._call(self._client.execute(command, arguments or None), timeout)

    def take_event(self, name: str) -> dict[str, Any] | None:
        """The oldest event ``name`` that has come and was not taken, or None; never waits."""
        return self._call(self._take(name), TIMEOUT_S)

    def close(self) -> None:
        """Drops the connection, whatever state it is in, and ends the thread."""
        with contextlib.suppress(QMPError, EOFError, OSError, WaitTimeout):
            self._call(self._client.disconnect(), 5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any, timeout: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise WaitTimeout(f"no answer on QMP in {timeout:g} s") from None

    async def _take(self, name: str) -> dict[str, Any] | None:
        while not self._client.events.empty():
            self._pending.append(dict(await self._client.events.get()))
        found = next((event for event in self._pending if event["event"] == name), None)
        if found:
            self._pending.remove(found)
        return found


class QemuVm:
    """A QEMU process; use as a context manager.

    ``folder`` takes the files ``<name>.qmp`` (its path is to be below 108 bytes), ``.serial`` and
    ``.stderr``. ``incoming`` is ``-incoming``'s value, ``binary`` by default the installed one.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "vm",
        *,
        binary: QemuBinary | None = None,
        machine: str = "pc",
        accel: str = "tcg",
        memory_mib: int = 64,
        smp: int = 1,
        image: Path | None = None,
        incoming: str | None = None,
        extra: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.name, self.memory_mib, self.accel = folder, name, memory_mib, accel
        if (chosen := binary or distribution_qemu()) is None:
            raise VmError("no QEMU on this machine")
        self.binary: QemuBinary = chosen
        self.guest_args = guest_args(machine, memory_mib, smp, image, accel)
        self.extra = [*extra, *(["-incoming", incoming] if incoming else [])]
        self.environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: QmpConnection | None = None

    def __enter__(self) -> QemuVm:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._started().pid

    def command(self) -> list[str]:
        """The whole command line."""
        ours = ["-serial", f"file:{self._file('serial')}"]
        ours += ["-qmp", f"unix:{self._file('qmp')},server=on,wait=off"]
        return [*self.binary.command(), *self.guest_args, *ours, *self.extra]

    def start(self) -> QemuVm:
        """Starts QEMU and connects to its QMP; ``VmError`` with its stderr if it ends instead."""
        path = self._file("qmp")
        assert len(os.fsencode(path)) <= UNIX_PATH_MAX, f"socket path too long: {path}"
        self._process = self._spawn()
        try:
            self.wait_until(self._connect, "QMP")
        except BaseException:
            self.kill()
            raise
        return self

    def kill(self) -> None:
        """Ends the process if it lives, and waits until it is gone. May be called again."""
        if self._process:
            self._process.kill()
            self._process.wait()
        if self._qmp:
            self._qmp.close()
            self._qmp = None

    def quit(self, timeout: float = TIMEOUT_S) -> int:
        """Asks QEMU to quit; its exit code."""
        with contextlib.suppress(QMPError, EOFError, OSError):  # the answer may not get out
            self.qmp("quit")
        return self.wait_exit(timeout)

    def wait_exit(self, timeout: float = TIMEOUT_S) -> int:
        """Waits for the process to end by itself; its exit code, negative for a signal."""
        try:
            return self._started().wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.error(f"still runs after {timeout:g} s") from None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def qmp(self, command: str, **arguments: Any) -> Any:
        """A QMP command's return value; ``_`` in argument names stands for ``-``."""
        return self._monitor().execute(command, _dashed(arguments))

    def hmp(self, line: str) -> str:
        """What the human monitor prints for ``line``, with newlines only."""
        return self.qmp("human-monitor-command", command_line=line).replace("\r\n", "\n")

    def wait_event(self, name: str, timeout: float = TIMEOUT_S) -> dict[str, Any]:
        """The oldest event ``name`` that no call returned before."""
        return self.wait_until(lambda: self._monitor().take_event(name), f"event {name}", timeout)

    def run_state(self) -> str:  # running, paused, postmigrate, inmigrate, ...
        return self.qmp("query-status")["status"]

    def serial(self) -> str:  # all that the guest has printed
        return self._read("serial")

    def wait_serial(self, text: str, timeout: float = TIMEOUT_S, count: int = 1) -> str:
        """Waits until ``text`` stands at least ``count`` times in the serial output; the output."""
        what = f"{count} x {text!r} on the serial line"
        self.wait_until(lambda: self.serial().count(text) >= count, what, timeout)
        return self.serial()

    def wait_passes(self, more: int = 1, timeout: float = TIMEOUT_S) -> None:
        """Waits until the guest has ended ``more`` further passes over its memory."""
        self.wait_serial(".", timeout, self.serial().count(".") + more)

    def wrong_words(self) -> list[tuple[int, int]]:
        """(address, value found) of every word the guest found to be wrong."""
        found = re.findall(r"E([0-9a-f]{8}):([0-9a-f]{8})", self.serial())
        return [(int(address, 16), int(value, 16)) for address, value in found]

    def set_capabilities(self, **states: bool) -> None:
        """``set_capabilities(postcopy_ram=True)``."""
        pairs = [{"capability": name, "state": on} for name, on in _dashed(states).items()]
        self.qmp("migrate-set-capabilities", capabilities=pairs)

    def set_parameters(self, **values: Any) -> None:
        """``set_parameters(max_bandwidth=1 << 20)``, in QMP's units."""
        self.qmp("migrate-set-parameters", **values)

    def migrate(self, uri: str, **arguments: Any) -> None:
        """Starts an outgoing migration, e.g. ``migrate("unix:PATH", resume=True)``."""
        self.qmp("migrate", uri=uri, **arguments)

    def start_postcopy(self) -> None:
        self.qmp("migrate-start-postcopy")

    def query_migrate(self) -> dict[str, Any]:
        return self.qmp("query-migrate")

    def wait_migration(self, *statuses: str, timeout: float = TIMEOUT_S) -> dict[str, Any]:
        """Waits for one of ``statuses``; ``query-migrate``'s answer. Raises if it ended otherwise.

        A poll: a status that passes quickly is missed, so name the later ones as well.
        """
        wanted = " or ".join(statuses)

        def reached() -> dict[str, Any] | None:
            info = self.query_migrate()
            status = info.get("status", "none")
            if status in ENDED and status not in statuses:
                raise self.error(f"migration is {status}, not {wanted}")
            return info if status in statuses else None

        return self.wait_until(reached, f"migration status {wanted}", timeout)

    def stderr(self) -> str:
        return self._read("stderr")

    def wait_until(
        self, condition: Callable[[], T | None], what: str, timeout: float = TIMEOUT_S
    ) -> T:
        """``wait_until`` that also ends, with all QEMU said, when the process has ended."""

        def checked() -> T | None:
            was_alive = self.alive()  # asked first: its last words still count
            value = condition()
            if not value and not was_alive:
                raise self.error(f"ended with {self.wait_exit()}, waiting for {what}")
            return value

        try:
            return wait_until(checked, what, timeout)
        except (WaitTimeout, QMPError, EOFError, OSError) as error:
            raise self.error(f"{what}: {error!r}") from error

    def error(self, text: str) -> VmError:
        """A ``VmError`` that tells all we know about this VM."""
        known = [f"{self.name}: {text}", f"command: {' '.join(self.command())}"]
        known += [f"stderr: {self.stderr()[-4000:]}", f"serial: {self.serial()[-400:]!r}"]
        with contextlib.suppress(Exception):
            known.append(f"migration: {self.query_migrate()}")
        return VmError("\n".join(known))

    def _file(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    def _started(self) -> subprocess.Popen[bytes]:
        assert self._process, f"{self.name} is not started"
        return self._process

    def _monitor(self) -> QmpConnection:
        assert self._qmp, f"{self.name} is not started"
        return self._qmp

    def _read(self, suffix: str) -> str:
        path = self._file(suffix)
        return path.read_text("latin-1") if path.exists() else ""

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = self.command()
        env = {**self.binary.full_environment(), **self.environment}
        with self._file("stderr").open("wb") as out:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env,
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _connect(self) -> bool:
        """One attempt; False while QEMU does not listen yet."""
        path = self._file("qmp")
        if self._qmp is None and path.exists():
            with contextlib.suppress(ConnectError):
                self._qmp = QmpConnection(path)
        return self._qmp is not None


def _dashed(names: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in names.items()}


def _die_with_parent() -> None:
    """In the child, before exec: a test run that is killed leaves no QEMU spinning."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
