"""A program under `sharded-pc guest` that maps RAM as a test tells it (tests/native/mapper.c)."""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.preload_kit import HERE, NATIVE, WAIT_S

GUEST = (sys.executable, "-m", "sharded_pc", "guest")


@pytest.fixture(scope="module")
def mapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/mapper.c"""
    path = tmp_path_factory.mktemp("mapper") / "mapper"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]
    core = [NATIVE / name for name in ("lab/oracle.c", "shared/control.c", "records.c")]
    sources = [HERE / "native/mapper.c", *core]
    subprocess.run(["cc", *flags, f"-I{NATIVE}", "-o", path, *sources, "-pthread"], check=True)
    return path


class Mapper:
    """One such process; ``ask`` is a line and its answer. A context manager that kills it."""

    def __init__(self, program: Path, *options: str, wrapper: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*GUEST, *options, "--", *wrapper, program], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._timer = threading.Timer(2 * WAIT_S, self.process.kill)  # no answer may be waited for
        self._timer.start()

    def __enter__(self) -> Mapper:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def say(self, *words: object) -> None:
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        return self.process.stdout.readline().rstrip("\n")

    def ask(self, *words: object) -> str:
        self.say(*words)
        return self.hear()

    def do(self, *words: object) -> str:
        """What it answers behind "ok"."""
        answer = self.ask(*words)
        assert answer.split()[:1] == ["ok"], f"{words}: {answer!r}: {self.errors()}"
        return answer.removeprefix("ok").strip()

    def errors(self) -> str:
        """What it has said on stderr, once it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        return self.process.stderr.read() if self.process.poll() is not None else "(it lives)"

    def finish(self) -> str:
        """Nothing more is said to it, and it ends well; its stderr."""
        _, err = self.process.communicate(timeout=WAIT_S)
        assert self.process.returncode == 0, err
        return err


@contextlib.contextmanager
def sender(path: Path, *files: int | Path) -> Iterator[Path]:
    """Sends descriptors of the files over a Unix socket, one to each who connects."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(WAIT_S)
        thread = threading.Thread(target=_send_all, args=(server, files))
        thread.start()
        yield path
        thread.join(WAIT_S)


def _send_all(server: socket.socket, files: Sequence[int | Path]) -> None:
    for file in files:
        fd = os.open(file, os.O_RDWR) if isinstance(file, Path) else file
        client, _ = server.accept()
        with client:
            rights = array.array("i", [fd])
            client.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        os.close(fd)
