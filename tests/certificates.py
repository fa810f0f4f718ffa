"""Certificates for the test run, and a source's TLS with them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sharded_pc.testing.certificates import Authority
from sharded_pc.transport.tls.credentials import X509
from sharded_pc.transport.tls.pump import Pump
from sharded_pc.transport.tls.wire import TlsWire
from tests.synthetic import WAIT_S, Background


@functools.cache
def certificates() -> Path:
    """One CA with a `server` and a `client`; for the whole test run, to be read only."""
    folder = Path(tempfile.mkdtemp(prefix="sharded-pc-tests-"))
    atexit.register(shutil.rmtree, folder)
    authority = Authority(folder)
    authority.issue(folder / "server", "server")
    authority.issue(folder / "client", "client")
    return folder


def credentials(*allowed: str) -> X509:
    return X509(str(certificates() / "server"), allowed)


def client_context(folder: Path, *, shows: bool = True) -> ssl.SSLContext:
    """A source's, with what is in the folder."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(folder / "ca-cert.pem")
    if shows:
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context


@contextlib.contextmanager
def inside(sock: socket.socket, context: ssl.SSLContext | None = None) -> Iterator[socket.socket]:
    """The plain end of a source's connection, through the handshake; `sock` is taken over."""
    plain, ours = socket.socketpair()
    context = context or client_context(certificates() / "client")
    wire = TlsWire(sock, context, server_side=False)
    pump = Pump(wire, ours)
    with contextlib.closing(pump), plain:
        wire.handshake(WAIT_S)
        running = Background(lambda: (pump.run(), pump.close()))
        plain.settimeout(WAIT_S)
        try:
            yield plain
        finally:
            with contextlib.suppress(OSError):
                plain.shutdown(socket.SHUT_RDWR)
            running.thread.join(WAIT_S)
            assert not running.thread.is_alive(), "the source's TLS does not end"
