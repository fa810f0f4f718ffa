"""What a service manager hears; a socket of the test's plays systemd."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu import wait_until
from tests.receiver import Receiver
from tests.synthetic import WAIT_S, connect, open_source

pytestmark = pytest.mark.uffd

UNITS = sorted((Path(__file__).parents[1] / "contrib").glob("*.service"))


@pytest.fixture
def manager(tmp_path, monkeypatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(WAIT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def heard(manager: socket.socket, wanted: str) -> list[str]:
    """All datagrams up to the one that holds a line."""
    out: list[str] = []
    while not any(wanted in text.splitlines() for text in out):
        out.append(manager.recv(4096).decode())
    return out


def test_alive(tmp_path, unique_name, manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    with Receiver(tmp_path, unique_name, keep=False) as receiver:
        for _ in range(3):
            heard(manager, "WATCHDOG=1")
        receiver.signal(signal.SIGTERM)
        receiver.finish()


def test_ready_and_stopping(tmp_path, unique_name, manager):
    with Receiver(tmp_path, unique_name, keep=False) as receiver:
        heard(manager, "READY=1")
        with open_source(connect(receiver.uri())) as source:
            source.migrate()
        heard(manager, "STOPPING=1")
        assert receiver.finish().exit_code == 0


def test_a_receiver_that_hangs_is_not_alive(tmp_path, unique_name, manager, monkeypatch):
    """The beat is the event loop's: nothing else says that it lives."""
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    with Receiver(tmp_path, unique_name, keep=False) as receiver:
        heard(manager, "WATCHDOG=1")
        os.kill(receiver.pid, signal.SIGSTOP)
        manager.setblocking(False)
        wait_until(lambda: not pending(manager), "its last word", WAIT_S)
        os.kill(receiver.pid, signal.SIGCONT)
        wait_until(lambda: pending(manager), "a word", WAIT_S)
        receiver.signal(signal.SIGTERM)
        assert receiver.finish().exit_code == 143


def pending(manager: socket.socket) -> bool:
    try:
        return bool(manager.recv(4096))
    except BlockingIOError:
        return False


def test_another_process_is_watched(tmp_path, unique_name, manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    with Receiver(tmp_path, unique_name, keep=False) as receiver:
        receiver.signal(signal.SIGTERM)
        assert not any("WATCHDOG" in text for text in heard(manager, "STOPPING=1"))
        receiver.finish()


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_say_what_the_receiver_needs(unit):
    """A crash is followed by --resume, and nothing of the guest's is killed by the manager."""
    text = unit.read_text()
    for line in ("Type=notify", "KillMode=process", "OOMPolicy=continue", "Restart=on-abnormal"):
        assert line in text.splitlines()
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert "--resume %i" in command and "${INCOMING}" in command
    if tool := shutil.which("systemd-analyze"):
        there = text.replace("ExecStart=sharded-pc", f"ExecStart={shutil.which('true')}")
        copy = unit.name.replace("@", "@x")
        folder = Path(os.environ.get("TMPDIR", "/tmp"))
        path = folder / f"{os.getpid()}-{copy}"
        path.write_text(there)
        try:
            done = subprocess.run([tool, "verify", str(path)], capture_output=True, text=True)
        finally:
            path.unlink()
        assert "Unknown" not in done.stderr, done.stderr
