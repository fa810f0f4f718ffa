"""Bytes on their way through a connection's TLS, and how it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest

from sharded_pc.transport.tls.pump import Pump
from sharded_pc.transport.tls.wire import TlsWire
from tests.certificates import certificates, credentials, inside
from tests.synthetic import WAIT_S, Background

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command")


@contextlib.contextmanager
def pumped(wires: tuple[socket.socket, socket.socket] | None = None) -> Iterator[tuple]:
    """The source's wire, which stays in the test's hands; the source's plain end; the receiver's;
    what its pump ends with."""
    raw, ours = wires or socket.socketpair()
    near, end = socket.socketpair()
    wire = TlsWire(ours, credentials().context())
    pump = Pump(wire, end)

    def serve() -> str | None:
        try:
            wire.handshake(WAIT_S)
            return pump.run()
        finally:
            pump.close()

    serving_ = Background(serve)
    near.settimeout(WAIT_S)
    with near, raw.dup() as kept, inside(raw) as far:
        yield kept, far, near, serving_


def read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (part := sock.recv(1 << 20)):
        data += part
    return bytes(data)


def test_both_ways_at_once():
    """More than all buffers hold, and the end of each side comes through."""
    up, down = os.urandom(5_000_000), os.urandom(4_000_000)
    with pumped() as (_, far, near, pump):
        sending = [Background(lambda: far.sendall(up)), Background(lambda: near.sendall(down))]
        hears = Background(lambda: read(far, len(down)))
        assert read(near, len(up)) == up
        assert hears.result() == down
        for each in sending:
            each.result()
        far.close()
        assert near.recv(1) == b""
        near.close()
        assert pump.result() is None


def test_last_words_arrive():
    """Whoever closes has said all before, also if it did not read what came."""
    with pumped() as (_, far, near, pump):
        far.sendall(bytes(100_000))
        near.sendall(b"last")
        near.close()
        assert far.recv(99) == b"last" and far.recv(1) == b""
        assert pump.result() is None


def test_a_reader_that_waits_holds_the_sender_back():
    with pumped() as (_, far, near, _):
        far.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 << 20:
                sent += far.send(bytes(1 << 20))
        assert sent < 16 << 20
        near.close()


@pytest.mark.parametrize("how", ["closed", "reset", "rubbish"])
def test_a_wire_that_breaks(how):
    """Without close_notify it ends as a plain one does; only rubbish has a reason."""
    server = socket.create_server(("127.0.0.1", 0))
    with server:
        raw = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    with pumped((raw, ours)) as (kept, far, near, pump):
        far.sendall(b"before")
        assert near.recv(99) == b"before"
        if how == "rubbish":
            kept.setblocking(True)
            kept.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        elif how == "reset":
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            far.close()
            kept.close()
        else:
            kept.shutdown(socket.SHUT_RDWR)
        assert near.recv(1) == b""
        near.close()
        why = pump.result()
    assert why == ("TLS: decryption failed or bad record mac" if how == "rubbish" else None)


def test_key_updates():
    """GnuTLS changes its keys in long migrations; openssl(1) does it when told."""
    server = socket.create_server(("127.0.0.1", 0))
    base = certificates() / "client"
    port = server.getsockname()[1]
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3",
               "-cert", base / "client-cert.pem", "-key", base / "client-key.pem",
               "-CAfile", base / "ca-cert.pem"]  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with server, subprocess.Popen(command, bufsize=0, **pipes) as client:
        try:
            near, end = socket.socketpair()
            near.settimeout(WAIT_S)
            wire = TlsWire(server.accept()[0], credentials().context())
            pump = Pump(wire, end)
            wire.handshake(WAIT_S)
            running = Background(pump.run)
            for turn in range(3):
                client.stdin.write(b"before\n")
                assert near.recv(99) == b"before\n"
                client.stdin.write(b"K\n" if turn else b"k\n")
                wait_for_line(client.stderr, b"KEYUPDATE")
                client.stdin.write(b"after\n")
                assert near.recv(99) == b"after\n"
                near.sendall(b"answer %d\n" % turn)
                wait_for_line(client.stdout, b"answer %d" % turn)
            near.close()
            assert running.result() is None
        finally:
            client.kill()
            pump.close()


def wait_for_line(file, text: bytes) -> None:
    def look() -> None:
        while text not in (line := file.readline()):
            assert line, f"no {text!r}"

    Background(look).result()
