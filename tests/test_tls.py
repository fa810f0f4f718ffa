"""TLS: which source gets through, and what is said of those that do not."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import ssl
from pathlib import Path

import pytest

from sharded_pc.address import KeepAlive, TcpAddress, UnixAddress, parse
from sharded_pc.errors import RemoteProtocolError
from sharded_pc.testing.certificates import SOURCE_NAME, Authority
from sharded_pc.transport.incoming import Listener, listen
from sharded_pc.transport.tls import process as tls_process
from sharded_pc.transport.tls import refusals
from sharded_pc.transport.tls.credentials import HAS_PSK, PSK_KEYS, X509, Psk
from sharded_pc.transport.tls.door import Door
from tests.certificates import certificates, client_context, credentials, inside
from tests.qemu import wait_until
from tests.synthetic import WAIT_S

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command")
needs_psk = pytest.mark.skipif(not HAS_PSK, reason="n/a: needs Python >= 3.13")
MAGIC = b"QEVM\0\0\0\3"


class Place:
    """A listener behind a door; sources connect from threads."""

    def __init__(self, kind: str, folder: Path, creds: X509 | Psk) -> None:
        unix = UnixAddress(str(folder / "incoming"))
        self.door = Door(creds)
        keep = KeepAlive(idle=77)
        address = unix if kind == "unix" else TcpAddress("127.0.0.1", 0, keep)
        self.listener: Listener = listen(address, door=self.door)
        self.accepting = asyncio.ensure_future(self.listener.accept())

    def connect(self) -> socket.socket:
        where = self.listener.address
        if isinstance(where, UnixAddress):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(WAIT_S)
            sock.connect(where.path)
            return sock
        return socket.create_connection((where.host, where.port), timeout=WAIT_S)

    async def source(self, context: ssl.SSLContext | None = None) -> bytes:
        """A good one comes, and is taken; what it hears."""

        def migrate() -> bytes:
            with inside(self.connect(), context) as plain:
                plain.sendall(MAGIC)
                return plain.recv(99)

        coming = asyncio.to_thread(migrate)
        task = asyncio.ensure_future(coming)
        wire = await asyncio.wait_for(asyncio.shield(self.accepting), WAIT_S)
        assert os.read(wire.fd, 99) == MAGIC
        os.write(wire.back_fd, b"pong")
        heard = await task
        wire.close()
        return heard

    async def close(self) -> None:
        self.accepting.cancel()
        self.listener.close()
        await asyncio.gather(self.accepting, return_exceptions=True)
        await self.door.close()


def play(scene, folder: Path, *, kind: str = "tcp", creds: X509 | Psk | None = None) -> None:
    async def run() -> None:
        place = Place(kind, folder, creds or credentials())
        try:
            await asyncio.wait_for(scene(place), 2 * WAIT_S)
        finally:
            await place.close()

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_source_with_a_certificate(tmp_path, caplog, kind):
    async def scene(place: Place) -> None:
        assert await place.source() == b"pong"

    caplog.set_level("INFO")
    play(scene, tmp_path, kind=kind)
    assert f", {SOURCE_NAME}" in caplog.text


def shakes_hands(context: ssl.SSLContext):
    def talk(sock: socket.socket) -> None:
        with inside(sock, context) as plain, contextlib.suppress(OSError):
            plain.sendall(MAGIC)
            assert plain.recv(1) == b""

    return talk


def says(data: bytes):
    def talk(sock: socket.socket) -> None:
        with sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(99):
                pass

    return talk


def without() -> ssl.SSLContext:
    return client_context(certificates() / "client", shows=False)


def of_another_authority(folder: Path) -> ssl.SSLContext:
    other = Authority(folder / "other").issue(folder / "other", "client")
    shutil.copy(certificates() / "ca-cert.pem", folder / "other")
    return client_context(other)


def expired(folder: Path) -> ssl.SSLContext:
    ours = Authority.__new__(Authority)
    ours.certificate, ours.key = certificates() / "ca-cert.pem", certificates() / "ca-key.pem"
    return client_context(ours.issue(folder / "old", "client", days=-1))


STRANGERS = {
    "without a certificate": (lambda _: shakes_hands(without()), refusals.NO_CERTIFICATE),
    "of another authority": (
        lambda folder: shakes_hands(of_another_authority(folder)),
        "its certificate was refused: unable to get local issuer certificate (judged by ",
    ),
    "expired": (
        lambda folder: shakes_hands(expired(folder)),
        "its certificate was refused: certificate has expired",
    ),
    "plain": (lambda _: says(MAGIC + bytes(99)), refusals.NOT_TLS),
    "rubbish": (lambda _: says(b"GET / HTTP/1.0\r\n\r\n"), refusals.NOT_TLS),
    "half a hello": (lambda _: says(b"\x16\x03\x01"), "in the middle of the TLS handshake"),
    "a port scan": (lambda _: says(b""), "it closed without a word"),
    "nonsense inside": (
        lambda _: lambda sock: _nonsense(sock), "it is no source, it begins with 6e 6f"
    ),
}  # fmt: skip


def _nonsense(sock: socket.socket) -> None:
    with inside(sock) as plain:
        plain.sendall(b"nonsense")
        assert plain.recv(1) == b""


@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_is_told_of_and_keeps_nobody_out(tmp_path, caplog, who):
    make, why = STRANGERS[who]

    async def scene(place: Place) -> None:
        talk = make(tmp_path)

        def come() -> None:
            with contextlib.suppress(ssl.SSLError, OSError):
                talk(place.connect())

        await asyncio.to_thread(come)
        await asyncio.to_thread(wait_until, lambda: bool(caplog.records), "a line", WAIT_S)
        assert await place.source() == b"pong"

    play(scene, tmp_path)
    assert len(caplog.records) == 1 and why in caplog.text
    assert "connection from 127.0.0.1 closed: it" in caplog.text


def test_one_that_stops_in_the_handshake_keeps_nobody_out(tmp_path, caplog):
    async def scene(place: Place) -> None:
        with place.connect() as sock:
            sock.sendall(b"\x16\x03\x01")
            assert await place.source() == b"pong"

    play(scene, tmp_path)
    assert not caplog.records


def test_only_who_is_named_is_let_in(tmp_path, caplog):
    async def refused(place: Place) -> None:
        await asyncio.to_thread(shakes_hands(client_context(certificates() / "client")),
                                place.connect())  # fmt: skip
        await asyncio.to_thread(wait_until, lambda: bool(caplog.records), "a line", WAIT_S)

    async def let_in(place: Place) -> None:
        assert await place.source() == b"pong"

    play(refused, tmp_path, creds=credentials("CN=other"))
    assert f"name is not in --tls-authz: {SOURCE_NAME}" in caplog.text
    caplog.clear()
    play(let_in, tmp_path, creds=credentials("CN=other", SOURCE_NAME))
    assert not caplog.records


def test_no_certificate_where_none_is_asked_for(tmp_path, caplog):
    """verify-peer=off, as by migrate_tls_x509_verify = 0 of libvirt."""
    open_to_all = dataclasses.replace(credentials(), verify_peer=False)

    async def scene(place: Place) -> None:
        assert await place.source(without()) == b"pong"

    play(scene, tmp_path, creds=open_to_all)
    assert not caplog.records


def test_a_revoked_certificate(tmp_path, caplog):
    authority = Authority(tmp_path / "all")
    folder = authority.issue(tmp_path / "all", "server")
    authority.issue(folder, "client")
    authority.revoke(folder)
    X509(str(folder)).check()

    async def scene(place: Place) -> None:
        with contextlib.suppress(ssl.SSLError):
            await asyncio.to_thread(shakes_hands(client_context(folder)), place.connect())
        await asyncio.to_thread(wait_until, lambda: bool(caplog.records), "a line", WAIT_S)

    play(scene, tmp_path, creds=X509(str(folder)))
    assert "its certificate was refused: certificate revoked" in caplog.text


def test_a_renewed_certificate_counts_at_once(tmp_path):
    folder = Path(shutil.copytree(certificates() / "server", tmp_path / "files"))

    async def scene(place: Place) -> None:
        await asyncio.to_thread(shakes_hands(without()), place.connect())
        ours = Authority.__new__(Authority)
        ours.certificate, ours.key = certificates() / "ca-cert.pem", certificates() / "ca-key.pem"
        ours.issue(folder, "server")
        assert await place.source() == b"pong"

    play(scene, tmp_path, creds=X509(str(folder)))


def test_tls_where_none_is_spoken(tmp_path, caplog):
    async def scene() -> None:
        listener = listen(UnixAddress(str(tmp_path / "incoming")))
        accepting = asyncio.ensure_future(listener.accept())

        def come() -> None:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(tmp_path / "incoming"))
                with contextlib.suppress(Exception), inside(sock):
                    pass

        await asyncio.to_thread(come)
        await asyncio.to_thread(wait_until, lambda: bool(caplog.records), "a line", WAIT_S)
        accepting.cancel()
        listener.close()
        await asyncio.gather(accepting, return_exceptions=True)

    asyncio.run(scene())
    assert "it speaks TLS: start this receiver with --tls-creds or --tls-psk" in caplog.text


def test_others_may_reach_it(tmp_path, caplog):
    """The warning that the stream is plain goes; the one of a plain receiver stays."""

    async def scene() -> None:
        for door in (None, Door(credentials())):
            listen(TcpAddress("0.0.0.0", 0), door=door).close()

    asyncio.run(scene())
    assert [r.getMessage().count("neither encrypted") for r in caplog.records] == [1]


def test_the_network_is_watched_where_it_is(tmp_path, monkeypatch):
    """Keep-alive and no delay belong to the connection itself."""
    seen = []

    async def scene(place: Place) -> None:
        handing = place.door.open

        async def look(sock: socket.socket, peer: str):
            options = (socket.TCP_NODELAY, socket.TCP_KEEPIDLE)
            seen.append([sock.getsockopt(socket.IPPROTO_TCP, each) for each in options])
            return await handing(sock, peer)

        monkeypatch.setattr(place.door, "open", look)
        await place.source()

    play(scene, tmp_path)
    assert seen == [[1, 77]]


def test_a_process_that_dies_has_a_successor(tmp_path, caplog):
    async def scene(place: Place) -> None:
        await asyncio.to_thread(says(MAGIC), place.connect())
        await asyncio.to_thread(wait_until, lambda: bool(caplog.records), "a line", WAIT_S)
        process = place.door.process
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.to_thread(wait_until, lambda: not process.is_alive(), "its end", WAIT_S)
        assert await place.source() == b"pong"

    play(scene, tmp_path)
    assert "the TLS process died (exit code -9)" in caplog.text


def deaf(conn, credentials) -> None:
    """In the place of the TLS process: lives, and does nothing."""
    while not conn.poll(WAIT_S):
        pass
    signal.pause()


def test_a_process_that_hangs_has_a_successor(tmp_path, caplog, monkeypatch):
    """Who waits at it is let go, with the reason; nobody else waits."""
    monkeypatch.setattr(tls_process, "SILENT_SECONDS", 0.5)
    main = tls_process.serving.main
    monkeypatch.setattr(tls_process.serving, "main", deaf)

    async def scene(place: Place) -> None:
        with contextlib.suppress(OSError):
            await asyncio.to_thread(says(MAGIC), place.connect())
        await asyncio.to_thread(wait_until, lambda: len(caplog.records) > 1, "two lines", WAIT_S)
        monkeypatch.setattr(tls_process.serving, "main", main)
        assert await place.source() == b"pong"

    play(scene, tmp_path)
    assert "closed: its TLS process was ended: it hung, no sign of life for 0.5 s" in caplog.text


def test_a_process_that_goes_on_is_left_alone(tmp_path, caplog, monkeypatch):
    """It answers, and was looked at more often than it may be silent."""

    async def scene(place: Place) -> None:
        assert await place.source() == b"pong"
        process, looks = place.door.process, []
        look = process._look
        monkeypatch.setattr(process, "_look", lambda: (look(), looks.append(process._silent)))
        monkeypatch.setattr(tls_process, "LOOK_SECONDS", 0.005)
        monkeypatch.setattr(tls_process, "SILENT_SECONDS", 0.5)
        await asyncio.to_thread(wait_until, lambda: len(looks) > 250, "looks", WAIT_S)
        assert process.is_alive() and looks.count(0) > 2

    play(scene, tmp_path)
    assert not caplog.records


def test_a_descriptor_whose_peer_does_not_get_through():
    async def scene() -> None:
        sock, ours = socket.socketpair()
        door = Door(credentials())
        listener = listen(parse(f"fd:{ours.detach()}"), door=door)
        talking = asyncio.ensure_future(asyncio.to_thread(says(MAGIC), sock))
        try:
            await asyncio.wait_for(listener.accept(), WAIT_S)
        finally:
            await talking
            await door.close()

    with pytest.raises(RemoteProtocolError, match=r"^fd:\d+: it does not speak TLS"):
        asyncio.run(scene())


# --- shared keys ---


@needs_psk
def test_a_shared_key(tmp_path, caplog):
    (tmp_path / PSK_KEYS).write_text("other:aa\nqemu:00112233445566778899aabbccddeeff\n")

    def client(key: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("PSK")
        context.set_psk_client_callback(lambda hint: ("qemu", bytes.fromhex(key)))
        return context

    async def scene(place: Place) -> None:
        def come(key: str) -> None:
            with inside(place.connect(), client(key)) as plain:
                plain.sendall(MAGIC)
                plain.recv(1)

        with contextlib.suppress(ssl.SSLError, Exception):
            await asyncio.to_thread(come, "00" * 16)
        await asyncio.to_thread(wait_until, lambda: bool(caplog.records), "a line", WAIT_S)
        good = asyncio.ensure_future(asyncio.to_thread(come, "00112233445566778899aabbccddeeff"))
        wire = await asyncio.wait_for(asyncio.shield(place.accepting), WAIT_S)
        assert os.read(wire.fd, 99) == MAGIC
        wire.close()
        await good

    play(scene, tmp_path, creds=Psk(str(tmp_path)))
    assert "has the source the same key" in caplog.text
