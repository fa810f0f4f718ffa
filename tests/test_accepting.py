"""Whoever listens survives that the system is short of descriptors, and peers that went away."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sharded_pc.observe.qmp import QmpServer
from sharded_pc.state import MigrationStatus
from sharded_pc.transport import accepting
from sharded_pc.transport.accepting import Acceptor
from sharded_pc.transport.incoming import bind_unix
from tests.attach_clients import Client, address
from tests.qemu import wait_until
from tests.synthetic import WAIT_S, Receiving, open_source


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open none: it has 0, 1 and 2."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # poll() wants that many
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Balking:
    """A listening socket whose accept() meets these errors before it does its work."""

    def __init__(self, sock: socket.socket, *errors: int) -> None:
        self._sock, self._errors = sock, list(errors)

    def accept(self):
        if self._errors:
            number = self._errors.pop(0)
            raise OSError(number, os.strerror(number))
        return self._sock.accept()

    def __getattr__(self, name: str):
        return getattr(self._sock, name)


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.setattr(accepting, "PAUSE_SECONDS", 0.01)
    with bind_unix(str(tmp_path / "socket")) as sock:
        yield sock


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM", "ECONNABORTED"])
def test_what_passes_is_waited_for(listening, caplog, name):
    """The connection stays in the queue; one line tells, and none for a peer that gave up."""
    number = getattr(errno, name)
    acceptor = Acceptor(Balking(listening, number, number, number))
    with connected(listening.getsockname()):
        asyncio.run(asyncio.wait_for(acceptor.accept(), WAIT_S)).close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (name != "ECONNABORTED")
    assert all(os.strerror(number) in line and listening.getsockname() in line for line in told)


def test_what_no_waiting_mends_is_raised(listening):
    acceptor = Acceptor(Balking(listening, errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument"):
        asyncio.run(asyncio.wait_for(acceptor.accept(), WAIT_S))


@pytest.mark.uffd
def test_the_attach_socket_hears_again(tmp_path, unique_name, caplog):
    """Guests that come while the receiver has no descriptor left are served when it has."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        open_source(receiver.sock) as source,
        socket.socket(socket.AF_UNIX) as early,
    ):
        source.set_up()
        control = receiver.coordinator.memory.control
        wait_until(lambda: control.status is MigrationStatus.ACTIVE, "the block list", WAIT_S)
        with no_descriptors():  # nothing more comes from the source: nothing else needs one
            early.connect(receiver.attach)
            wait_until(lambda: "Too many open files" in caplog.text, "the shortage", WAIT_S)
        with Client(receiver.attach) as client:
            address()(client)
            assert "attached" in client.answer()
        source.precopy()
        source.switch()
        source.end()
        receiver.finish()


def test_the_control_socket_hears_again(tmp_path, caplog):
    """And says so in a line, without a traceback."""

    async def shortage(path: str, ask: Callable[[], dict]) -> dict:
        server = QmpServer(path, ())
        await server.start()
        with socket.socket(socket.AF_UNIX) as early:
            with no_descriptors():
                early.connect(path)
                while not caplog.records:
                    await asyncio.sleep(0)
            try:
                return await asyncio.wait_for(asyncio.to_thread(ask), WAIT_S)
            finally:
                await server.close()

    def ask() -> dict:
        with connected(path) as sock, sock.makefile() as file:
            sock.settimeout(WAIT_S)
            return json.loads(file.readline())

    path = str(tmp_path / "control")
    assert "QMP" in asyncio.run(shortage(path, ask))
    (record,) = caplog.records
    assert "Too many open files" in record.getMessage() and record.exc_info is None
