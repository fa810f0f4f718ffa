"""The control socket of a receiver, and what its clients may not do: keep it from ending."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from tests.qemu import wait_until
from tests.receiver import Receiver
from tests.synthetic import WAIT_S, connect, open_source

pytestmark = pytest.mark.uffd

CAPABILITIES = json.dumps({"execute": "qmp_capabilities"}).encode()
QUERIES = json.dumps({"execute": "query-migrate"}).encode() * 50


def deaf_client(path: Path) -> socket.socket:
    """Has asked until the receiver, whose answers it does not read, stopped listening to it."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.sendall(CAPABILITIES)
    sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        while True:
            sock.sendall(QUERIES)
    return sock


def test_a_client_that_does_not_read_cannot_keep_the_receiver(tmp_path, unique_name):
    """One SIGTERM ends it, whatever waits to be read by somebody who never will."""
    with (
        Receiver(tmp_path, unique_name, keep=False, control=True) as receiver,
        deaf_client(receiver.control_path),
    ):
        receiver.signal(signal.SIGTERM)
        assert receiver.finish(timeout=5).exit_code == 143


def test_a_client_that_does_not_read_has_its_last_word_cut_short(tmp_path, unique_name):
    """A migration that has completed waits for its control clients for a moment, not for ever."""
    with (
        Receiver(tmp_path, unique_name, keep=False, control=True) as receiver,
        deaf_client(receiver.control_path),
        open_source(connect(receiver.uri())) as source,
    ):
        source.migrate()
        assert receiver.finish(timeout=10).exit_code == 0


def test_rubbish_gets_its_error_although_the_socket_closes(tmp_path, unique_name):
    """What was said last reaches a client that reads."""
    with (
        Receiver(tmp_path, unique_name, keep=False, control=True) as receiver,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.settimeout(WAIT_S)
        sock.connect(str(receiver.control_path))
        sock.sendall(b"rubbish")
        said = b""
        while data := sock.recv(4096):
            said += data
        assert "not JSON" in json.loads(said.splitlines()[-1])["error"]["desc"]
        receiver.signal(signal.SIGTERM)
        wait_until(lambda: not receiver.alive(), "its end", WAIT_S)
        receiver.finish()
