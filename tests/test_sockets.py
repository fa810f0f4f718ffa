"""Other users of this host, and clients that say nothing: whom sockets let in, and how many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sharded_pc
from sharded_pc import shm
from sharded_pc.address import TcpAddress
from sharded_pc.attach import server
from sharded_pc.errors import AttachError
from sharded_pc.observe import qmp
from sharded_pc.observe.qmp import Command, QmpServer
from sharded_pc.transport.incoming import bind_unix, listen
from sharded_pc.transport.peers import Peer, peer_of
from tests.attach_clients import Client, address
from tests.own_folder import OwnFolder
from tests.qemu import wait_until
from tests.receiver import Receiver
from tests.synthetic import WAIT_S, Receiving, open_source

NOBODY = 65534
STRANGER = f"""
import os, socket, sys
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
sock = socket.socket(socket.AF_UNIX)
sock.settimeout({WAIT_S})
try:
    sock.connect(sys.argv[1])
    print("heard", sock.recv(99))
except OSError as error:
    print(type(error).__name__)
"""

FALSE_RECEIVER = f"""
import os, socket, sys
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
sock = socket.socket(socket.AF_UNIX)
sock.settimeout({WAIT_S})
sock.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
sock.listen()
print("listening", flush=True)
print("heard", sock.accept()[0].recv(99), flush=True)
"""


# --- other users ---


def stranger(path: Path) -> str:
    """What another user meets there."""
    command = [sys.executable, "-c", STRANGER, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S + 5, check=True)
    return done.stdout.strip()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that anybody may enter, for runtime folders."""
    if os.geteuid():
        pytest.skip("n/a: only root can play another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.mark.uffd
@pytest.mark.usefixtures("place")
def test_another_user_is_kept_out(tmp_path, unique_name):
    """By the folder; if somebody has opened that, by the sockets; if these as well, by the
    receiver, without an answer.  Everybody else is served as before."""
    with OwnFolder(tmp_path, unique_name, keep=False) as receiver:
        folder, sockets = receiver.runtime_folder(), (receiver.attach_path, receiver.control_path)
        assert [stranger(path) for path in sockets] == ["PermissionError"] * 2
        folder.chmod(0o711)
        assert [stranger(path) for path in sockets] == ["PermissionError"] * 2
        for path in sockets:
            path.chmod(0o666)
        assert [stranger(path) for path in sockets] == ["heard b''"] * 2
        quit_by_qmp(receiver)
    told = re.findall(
        r"connection to (\S+) refused: process \d+ belongs to uid 65534", told_by(receiver)
    )
    assert told == [str(path) for path in sockets]


def told_by(receiver: Receiver) -> str:
    return receiver.finish().stderr


def quit_by_qmp(receiver: Receiver) -> None:
    with connected(str(receiver.control_path)) as sock, sock.makefile("rw") as file:
        assert "QMP" in file.readline()
        file.write('{"execute": "qmp_capabilities"} {"execute": "quit"}')
        file.flush()
        assert [json.loads(file.readline()) for _ in range(2)] == [{"return": {}}] * 2


def test_a_guest_does_not_trust_another_users_receiver(place):
    """One that sits where the receiver's socket is looked for is told nothing, not even hello."""
    place.chmod(0o1777)
    path = str(place / "attach")
    command = [sys.executable, "-c", FALSE_RECEIVER, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as false:
        assert false.stdout.readline() == "listening\n"
        with pytest.raises(AttachError, match=f"{path} .process {false.pid}. belongs to uid 65534"):
            sharded_pc.attach(path, timeout=WAIT_S)
        assert false.communicate(timeout=WAIT_S) == ("heard b''\n", None)


def test_this_user_and_root_are_trusted(monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        assert peer_of(one) == (os.getpid(), os.geteuid(), os.getegid())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert [Peer(1, uid, 1000).is_trusted for uid in (0, 1000, 1001, NOBODY)] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("mask", [0, 0o022])
def test_a_socket_is_never_open_to_others(tmp_path, monkeypatch, mask):
    """Not even between its making and a chmod(), which might meet another file by then."""

    def refuse(*_: object) -> None:
        pytest.fail("chmod")

    monkeypatch.setattr(os, "chmod", refuse)
    before = os.umask(mask)
    try:
        with bind_unix(str(tmp_path / "socket")):
            assert stat.S_IMODE((tmp_path / "socket").stat().st_mode) == 0o600
    finally:
        os.umask(before)


@pytest.mark.uffd
def test_shared_memory_is_closed_to_others(tmp_path, unique_name):
    """Every segment: control, pool, bitmaps, and each block's."""
    before = os.umask(0)
    try:
        with Receiving(tmp_path, unique_name) as receiver, open_source(receiver.sock) as source:
            source.set_up()
            wait_until(lambda: receiver.coordinator.memory.geometry, "the block list", WAIT_S)
            names = [segment.name for segment in receiver.coordinator.memory.blocks]
            found = {path.name: path.stat() for path in shm.ROOT.glob(f"{unique_name}[.%]*")}
            receiver.quit()
    finally:
        os.umask(before)
    own = {f"{unique_name}{suffix}" for suffix in (shm.CONTROL, shm.POOL, shm.BITMAPS)}
    assert set(found) == own | {name.lstrip("/") for name in names}
    assert {(stat.S_IMODE(each.st_mode), each.st_uid) for each in found.values()} == {
        (0o600, os.geteuid())
    }


# --- other hosts ---


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "127.0.0.1", "localhost", "::1"])
def test_who_listens_to_other_hosts_is_told_what_that_means(caplog, host):
    """Once, in one line; a receiver that only this host can reach says nothing."""
    if ":" in host and not Path("/proc/net/if_inet6").exists():
        pytest.skip("n/a: no IPv6 here")
    listen(TcpAddress(host, 0)).close()
    told = [record.getMessage() for record in caplog.records]
    if host in ("127.0.0.1", "localhost", "::1"):
        assert told == []
    else:
        assert len(told) == 1
        assert re.match(r"tcp:\S*:0 can be reached from other hosts", told[0])
        assert "neither encrypted nor authenticated" in told[0]


# --- clients that keep others out ---


@pytest.mark.uffd
def test_silent_clients_do_not_keep_a_guest_out(tmp_path, unique_name, monkeypatch):
    """No more than so many are heard at a time, and each is sent away when it says nothing."""
    monkeypatch.setattr(server, "MAX_CLIENTS", 3)
    with (
        Receiving(tmp_path, unique_name, attach_step_seconds=0.3) as receiver,
        open_source(receiver.sock) as source,
        contextlib.ExitStack() as stack,
    ):
        source.set_up()
        silent = [stack.enter_context(Client(receiver.attach)) for _ in range(9)]
        clients = receiver.coordinator.migration.attach._clients
        wait_until(lambda: len(clients) == 3, "a full house", WAIT_S)
        with Client(receiver.attach) as client:
            address()(client)
            assert "attached" in client.answer()
            assert len(clients) <= 3
        assert "said nothing for 0.3 s" in silent[0].error()
        source.precopy()
        source.switch()
        source.end()
        receiver.finish()


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT_S)
    sock.connect(path)
    return sock


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Has a scene played, in a thread, at a control socket with room for three."""
    monkeypatch.setattr(qmp, "MAX_CLIENTS", 3)
    path = str(tmp_path / "control")

    async def play(scene: Callable[[str], None]) -> None:
        server = QmpServer(path, [Command("query-migrate", dict)])
        await server.start()
        try:
            await asyncio.wait_for(asyncio.to_thread(scene, path), WAIT_S)
        finally:
            await server.close()

    return lambda scene: asyncio.run(play(scene))


class Operator:
    """A control client that is served."""

    def __init__(self, path: str) -> None:
        self.sock = connected(path)
        self._file = self.sock.makefile("rw")
        assert "QMP" in self._file.readline()

    def ask(self, command: str) -> bool:
        """It answers; false if the receiver has closed."""
        try:
            self._file.write(json.dumps({"execute": command}))
            self._file.flush()
            return "return" in json.loads(self._file.readline() or "{}")
        except ConnectionError:
            return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self.sock.close()


def test_there_is_always_room_for_an_operator(control, caplog):
    """However many came first and say nothing, or half a JSON value, or only capabilities; those
    that did not even negotiate go first."""

    def scene(path: str) -> None:
        with contextlib.ExitStack() as stack:

            def enter() -> Operator:
                operator = Operator(path)
                stack.callback(operator.close)
                return operator

            watching = enter()
            assert watching.ask("qmp_capabilities")
            for said in (b"", b'{"execute": "qu', b"", b"", b"{", b""):
                enter().sock.sendall(said)
            late = enter()
            assert late.ask("qmp_capabilities") and late.ask("query-migrate")
            assert watching.ask("query-migrate")
            assert all(enter().ask("qmp_capabilities") for _ in range(2))
            assert not late.ask("query-migrate"), "of those that negotiated, the most silent one"
            assert watching.ask("query-migrate")

    control(scene)
    assert {record.getMessage() for record in caplog.records} == {
        "control client dropped: 3 are connected, and it was silent for the longest time"
    }


def test_half_a_value_is_held_up_to_a_limit(control):
    def scene(path: str) -> None:
        operator = Operator(path)
        with contextlib.suppress(ConnectionError):
            operator.sock.sendall(b'{"execute": "' + b"x" * (1 << 20))
        said = b""
        with contextlib.suppress(ConnectionError):
            while data := operator.sock.recv(4096):
                said += data
        operator.close()
        assert b"more than 262144 bytes" in said or not said

    control(scene)
