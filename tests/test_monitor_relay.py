"""The relay between a monitor and its client (attach/monitor): a real process has it, the tests are
its client and its receiver."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.qemu import wait_until
from tests.test_native_sanitized import ADDRESS, FIXED, NATIVE, THREAD, WARNINGS, pytestmark, run

__all__ = ["pytestmark"]
ATTACH = NATIVE.parent / "attach"
SOURCES = [
    Path(__file__).parent / "native" / "relay_host.c",
    *(ATTACH / "monitor").glob("*.c"),
    *(ATTACH / "guest" / name for name in ("channel.c", "message.c")),
]
FRAME = struct.Struct("=II")
WAIT_S = 10.0


@pytest.fixture(scope="module", params=[ADDRESS, THREAD], ids=["address", "thread"])
def program(tmp_path_factory: pytest.TempPathFactory, request) -> Path:
    path = tmp_path_factory.mktemp("relay") / "relay_host"
    flags = ["-std=gnu11", "-g", "-O1", *WARNINGS, *request.param, "-pthread"]
    folders = [f"-I{NATIVE}", f"-I{NATIVE.parent}"]
    run(["cc", *flags, *folders, "-o", path, *SOURCES])
    return path


class Client:
    """Whoever manages the guest."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(str(path))
        self._lines = self.sock.makefile("rb")
        self.ticks: list[int] = []
        assert "QMP" in self.hear()

    def say(self, *names: str, fds: tuple[int, ...] = ()) -> None:
        """All in one write; a command's id is its name."""
        commands = [json.dumps({"execute": name, "id": name}) for name in names]
        socket.send_fds(self.sock, ["\r\n".join(commands).encode()], fds)

    def hear(self) -> dict[str, Any]:
        """The next message that is no TICK."""
        while True:
            line = self._lines.readline()
            assert line, "the monitor is closed"
            message = json.loads(line)
            if message.get("event") != "TICK":
                return message
            self.ticks.append(message["data"])

    def reply(self) -> dict[str, Any]:
        """The next that is no event."""
        while "event" in (message := self.hear()):
            pass
        return message

    def ask(self, name: str, **more: Any) -> dict[str, Any]:
        self.say(name, **more)
        reply = self.reply()
        assert reply["id"] == name
        return reply["return"]

    def events_until(self, name: str) -> list[str]:
        """Events that come before the reply to this command."""
        self.say(name)
        found = []
        while "event" in (message := self.hear()):
            found.append(message["event"])
        assert message["id"] == name
        return found

    def close(self) -> None:
        self._lines.close()
        self.sock.close()


class Peer:
    """The receiver's end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.settimeout(WAIT_S)
        self._server.bind(str(path))
        self._server.listen()
        self.sock: socket.socket

    def accept(self) -> Peer:
        self.sock, _ = self._server.accept()
        self.sock.settimeout(WAIT_S)
        return self

    def die(self) -> None:
        self.sock.close()
        self._server.close()
        self._path.unlink(missing_ok=True)

    def send(self, kind: str, message: object = None) -> None:
        data = b"" if message is None else json.dumps(message).encode()
        self.sock.sendall(FRAME.pack(ord(kind), len(data)) + data)

    def take(self) -> tuple[str, Any]:
        kind, size = FRAME.unpack(self._exactly(FRAME.size))
        data = self._exactly(size)
        return chr(kind), json.loads(data) if data else None

    def _exactly(self, size: int) -> bytes:
        return self.sock.recv(size, socket.MSG_WAITALL) if size else b""

    def command(self) -> dict[str, Any]:
        kind, message = self.take()
        assert kind == "C"
        return message

    def answer(self, value: object) -> str:
        """The command that is due is answered; its name."""
        message = self.command()
        self.send("A", {"return": value, "id": message["id"]})
        return message["execute"]

    def event(self, status: str) -> None:
        self.send("E", {"event": "MIGRATION", "data": {"status": status}})


class Lab:
    def __init__(self, folder: Path, process: subprocess.Popen[str], peer: Peer) -> None:
        self._folder = folder
        self.process, self.peer = process, peer
        self._clients: list[Client] = []

    def connect(self) -> Client:
        client = Client(self._folder / "qmp")
        self._clients.append(client)
        return client

    def close(self) -> None:
        self.peer.die()
        for client in self._clients:
            client.close()

    def client(self) -> Client:
        """Connected, capabilities negotiated."""
        client = self.connect()
        assert client.ask("qmp_capabilities")["did"] == "qmp_capabilities"
        return client

    def successor(self) -> None:
        self.peer = Peer(self._folder / "relay").accept()

    def threads(self) -> list[str]:
        found = []
        for each in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends
                found.append((each / "comm").read_text().strip())
        return found

    def hand_over(self) -> None:
        self.peer.send("O")
        assert self.peer.take() == ("L", None)
        wait_until(lambda: "sharded-pc-qmp" not in self.threads(), "the thread's end", WAIT_S)


@pytest.fixture
def lab(tmp_path: Path, program: Path) -> Iterator[Lab]:
    peer = Peer(tmp_path / "relay")
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*FIXED, program, tmp_path / "qmp", tmp_path / "relay"],
            stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "listens\n"
        with contextlib.closing(Lab(tmp_path, process, peer.accept())) as lab:
            yield lab
        assert process.poll() is None, errors.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == -signal.SIGTERM, errors.read_text()
        assert errors.read_text() == ""  # of a sanitizer
    finally:
        process.kill()
        process.communicate()


def test_what_is_qemus_passes(lab: Lab) -> None:
    """With descriptors; but for its MIGRATION events."""
    client = lab.client()
    assert client.events_until("query-status") == ["OTHER"]
    with open(os.devnull) as one, open(os.devnull) as two:
        fds = one.fileno(), two.fileno()
        assert client.ask("getfd", fds=fds) == {"did": "getfd", "fds": 2}
    assert client.ask("query-block") == {"did": "query-block", "fds": 0}


def test_replies_come_in_the_commands_order(lab: Lab) -> None:
    """Whoever gives them: QEMU is not asked before the receiver has answered."""
    client = lab.client()
    client.say("query-migrate", "query-status", "migrate-incoming", "cont")
    assert lab.peer.answer({"status": "active"}) == "query-migrate"
    assert lab.peer.answer({}) == "migrate-incoming"
    replies = [client.reply() for _ in range(4)]
    names = [reply["id"] for reply in replies]
    assert names == ["query-migrate", "query-status", "migrate-incoming", "cont"]
    assert replies[0]["return"] == {"status": "active"}


def test_what_is_no_json_is_qemus_to_refuse(lab: Lab) -> None:
    client = lab.client()
    client.sock.sendall(b"?")
    assert client.reply()["error"]["desc"] == "JSON parse error"
    assert client.ask("query-status")["did"] == "query-status"


def test_events_are_for_those_who_have_negotiated(lab: Lab) -> None:
    client = lab.connect()
    lab.peer.event("setup")
    lab.peer.send("P")
    assert lab.peer.take() == ("P", None)
    client.ask("qmp_capabilities")
    lab.peer.event("active")
    assert client.hear()["data"] == {"status": "active"}


def test_client_that_comes_again(lab: Lab) -> None:
    """As a libvirtd that was restarted: what its predecessor asked for is nobody's."""
    client = lab.client()
    client.say("query-migrate")
    asked = lab.peer.command()
    client.close()
    client = lab.client()
    client.say("query-migrate-capabilities")
    lab.peer.send("A", {"return": "old", "id": asked["id"]})
    assert lab.peer.answer([]) == "query-migrate-capabilities"
    assert client.reply() == {"return": [], "id": "query-migrate-capabilities"}


def test_receiver_that_dies(lab: Lab) -> None:
    """What it was asked its successor is; all else goes on, and a guest that runs is paused."""
    client = lab.client()
    lab.peer.event("postcopy-active")
    assert client.hear()["data"] == {"status": "postcopy-active"}
    lab.peer.die()
    assert client.hear()["data"] == {"status": "postcopy-paused"}
    assert client.ask("query-status")["did"] == "query-status"
    client.say("query-migrate")
    lab.successor()
    lab.peer.event("postcopy-paused")  # who manages the guest may have gone on meanwhile
    assert lab.peer.answer({"status": "postcopy-paused"}) == "query-migrate"
    assert client.hear()["return"] == {"status": "postcopy-paused"}
    for status in ("postcopy-active", "postcopy-paused"):
        lab.peer.event(status)
        assert client.hear()["data"] == {"status": status}


def test_it_leaves(lab: Lab) -> None:
    """Nothing is lost or cut in the middle of what QEMU says, and then all is QEMU's."""
    client = lab.client()
    while len(client.ticks) < 20:
        client.ask("query-status")
    lab.hand_over()
    lab.peer.die()
    assert client.events_until("query-migrate") == ["MIGRATION", "OTHER"]
    with open(os.devnull) as one:
        assert client.ask("getfd", fds=(one.fileno(),))["fds"] == 1
    for _ in range(20):
        client.ask("query-status")
    assert client.ticks == list(range(client.ticks[0], client.ticks[-1] + 1))
    client.close()
    assert lab.client().events_until("query-migrate") == ["MIGRATION", "OTHER"]


def test_it_leaves_when_nothing_is_under_way(lab: Lab) -> None:
    client = lab.client()
    client.say("query-migrate")
    asked = lab.peer.command()
    client.sock.sendall(b'{"execute": "query-')  # and a part of another
    lab.peer.send("O")
    with contextlib.suppress(TimeoutError):
        lab.peer.sock.settimeout(0.3)
        pytest.fail(f"said {lab.peer.take()}")
    lab.peer.sock.settimeout(WAIT_S)
    lab.peer.send("A", {"return": 1, "id": asked["id"]})
    assert client.reply()["return"] == 1
    client.sock.sendall(b'migrate", "id": 7}')
    assert client.reply() == {"return": {"did": "query-migrate", "fds": 0}, "id": 7}
    assert lab.peer.take() == ("L", None)


def test_it_leaves_without_a_client(lab: Lab) -> None:
    lab.hand_over()
    assert lab.client().events_until("query-migrate") == ["MIGRATION", "OTHER"]
