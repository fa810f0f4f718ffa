"""``sharded-pc-emulator`` as a real process, started as libvirt starts it, for tests.

It becomes QEMU in place, so an ``Emulated`` is a ``QemuVm`` of the same process. Its monitor
listens on a descriptor that it inherits; its settings are a file beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sharded_pc import shm
from sharded_pc.observe.view import ReceiverView
from tests.qemu import wait_until
from tests.qemu.vm import QemuVm
from tests.receiver import MARK, marked_processes

PROGRAM = Path(sys.executable).with_name("sharded-pc-emulator")
GONE_S = 10.0


class Emulated(QemuVm):
    """``settings`` are lines of its file; ``incoming`` is ``-incoming``'s value, None for none."""

    def __init__(
        self, folder: Path, name: str, *, settings: str = "", incoming: str | None = "defer",
        **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(folder, name, incoming=incoming, **more)
        self.extra = ["-S", *self.extra]
        self._place = folder / "bin"
        self._place.mkdir()
        (self._place / PROGRAM.name).symlink_to(PROGRAM)
        lines = f'qemu = "{self.binary.path}"\n{settings}'
        (self._place / "sharded-pc.toml").write_text(lines)
        self._temporary = Path(tempfile.mkdtemp(prefix="emu-"))  # sockets: tmp_path is long
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._file("qmp")))
        self._listener.listen(1)

    def command(self) -> list[str]:
        monitor = [
            "-chardev",
            f"socket,id=charmonitor,fd={self._listener.fileno()},server=on,wait=off",
        ]
        monitor += ["-mon", "chardev=charmonitor,id=monitor,mode=control"]
        named = ["-name", f"guest={self.name},debug-threads=on"]
        serial = ["-serial", f"file:{self._file('serial')}"]
        program = [str(self._place / PROGRAM.name), *self.binary.args, *named, *self.guest_args]
        return [*program, *serial, *monitor, *self.extra]

    def _spawn(self) -> subprocess.Popen[bytes]:
        own = {MARK: self.name, "TMPDIR": str(self._temporary)}
        with self._file("stderr").open("wb") as stderr:
            return subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                env={**self.binary.full_environment(), **own}, start_new_session=True,
                pass_fds=[self._listener.fileno()],
            )  # fmt: skip

    def launch(self) -> Emulated:
        """Starts it; who connects to its monitor is the test's affair."""
        self._process = self._spawn()
        return self

    @property
    def monitor_path(self) -> Path:
        return self._file("qmp")

    def receivers(self) -> list[int]:
        """Processes that were started for it and are not QEMU."""
        return [pid for pid in marked_processes(MARK, self.name) if pid != self.pid]

    def receiver(self) -> int:
        """Of these, the one that owns the memory."""
        with ReceiverView(self.name) as view:
            return view.owner

    def look(self) -> dict[str, Any]:
        """The receiver's figures."""
        with ReceiverView(self.name) as view:
            return view.info()

    def left(self) -> list[str]:
        """In shared memory and in the folder of temporary files."""
        names = [
            name
            for name in os.listdir(shm.ROOT)
            if name.startswith((f"{self.name}.", f"{self.name}%"))
        ]
        return names + os.listdir(self._temporary)

    def wait_gone(self) -> None:
        """The receiver has left nothing behind."""
        wait_until(lambda: not self.receivers() and not self.left(), "the receiver's end", GONE_S)

    def kill(self) -> None:
        try:
            super().kill()
            self._listener.close()
            wait_until(
                lambda: not marked_processes(MARK, self.name), f"the end of {self.name}'s", GONE_S
            )
            assert not self.left()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


def is_qemu(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system")
    return False
