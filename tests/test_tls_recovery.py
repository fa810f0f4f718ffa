"""A migration inside TLS: every byte, and the recovery of one that was cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc.address import UnixAddress
from sharded_pc.testing.certificates import SOURCE_NAME
from sharded_pc.testing.oracle import DIRTIED
from tests.certificates import certificates, client_context, credentials, inside
from tests.control import Control
from tests.guest_process import GuestProcess
from tests.synthetic import (
    ORACLE,
    WAIT_S,
    Background,
    Receiving,
    StepSource,
    connect,
    missing_pages,
    open_source,
)

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.usefixtures("placement"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command"),
]
DATA = missing_pages(ORACLE, 0, DIRTIED)


@contextlib.contextmanager
def migrating(tmp_path: Path, name: str, **settings) -> Iterator[tuple]:
    """A receiver whose guest runs on precopied pages, its source, the source's wire, a control
    client."""
    path = str(tmp_path / f"{name}.control")
    with contextlib.ExitStack() as stack:
        settings = {"control": path, "tls": credentials(SOURCE_NAME), **settings}
        receiver = stack.enter_context(Receiving(tmp_path, name, **settings))
        wire = stack.enter_context(receiver.sock.dup())
        source = stack.enter_context(open_source(stack.enter_context(inside(receiver.sock))))
        control = stack.enter_context(contextlib.closing(Control(path)))
        source.begin()
        source.wait_switched()
        yield receiver, source, wire, control


@contextlib.contextmanager
def recovered(source: StepSource, uri: str) -> Iterator[None]:
    with inside(connect(uri)) as plain:
        source.resume(plain)
        yield
        with contextlib.suppress(OSError):
            plain.shutdown(socket.SHUT_RDWR)
        source.back._thread.join(WAIT_S)


def test_every_byte(tmp_path, unique_name):
    """Requested pages and those that come by themselves, of two guests."""
    with migrating(tmp_path, unique_name) as (receiver, source, _, _), contextlib.ExitStack() as st:
        guests = [st.enter_context(GuestProcess()) for _ in range(2)]
        for seed, guest in enumerate(guests):
            guest.ask("attach", receiver.attach)
            guest.say("visit_all", seed)
        Background(source.end).result()
        assert [guest.answer() for guest in guests] == [[], []]
        assert receiver.finish()["status"] == "completed"


ENDS = {
    "network": "",
    "a killed process": "its TLS process died",
    "a stopped process": "its TLS process was ended: it was stopped (SIGSTOP)",
    "migrate-pause": "paused on request",
}


@pytest.mark.parametrize("what", ENDS)
def test_cut_and_recovered(tmp_path, unique_name, what):
    uri = f"unix:{tmp_path / 'again'}"
    with contextlib.ExitStack() as stack:
        receiver, source, wire, control = stack.enter_context(migrating(tmp_path, unique_name))
        guest = stack.enter_context(GuestProcess())
        guest.ask("attach", receiver.attach)
        source.send_pages(0, DATA[:50])
        guest.say("visit", 0, DATA[60:61])
        assert source.request() == (0, DATA[60])
        process = receiver.coordinator._doorway.door.process
        match what:
            case "network":
                wire.shutdown(socket.SHUT_RDWR)
            case "a killed process":
                os.kill(process.pid, signal.SIGKILL)
            case "a stopped process":
                os.kill(process.pid, signal.SIGSTOP)
            case _:
                control.execute("migrate-pause")
        why = control.wait_status("postcopy-paused")["error-desc"]
        assert ENDS[what] in why and ("TLS process" in why) == ("process" in what)
        source.back._thread.join(WAIT_S)
        assert source.back.over, "the source sees the end, too"
        assert guest.silent(), "its page is at the source"
        assert control.execute("migrate-recover", uri=uri) == {}
        with recovered(source, uri):
            assert source.request() == (0, DATA[60])
            source.send_pages(0, DATA[60:61])
            assert guest.answer() is None
            source.end()
            assert receiver.finish()["status"] == "completed"
        assert guest.ask("visit_all") == []


def test_only_the_source_recovers(tmp_path, unique_name, caplog):
    """At --recover-uri nobody gets in without a certificate, and the source comes after them."""
    uri = f"unix:{tmp_path / 'again'}"
    address = UnixAddress(uri.removeprefix("unix:"))
    with migrating(tmp_path, unique_name, recover_uri=address) as (receiver, source, wire, control):
        wire.shutdown(socket.SHUT_RDWR)
        control.wait_status("postcopy-recover-setup")
        with connect(uri) as sock:
            sock.sendall(b"\x08\0\x08\0\0")
            assert sock.recv(99) == b""
        bare = client_context(certificates() / "client", shows=False)
        with contextlib.suppress(OSError), inside(connect(uri), bare) as plain:
            assert plain.recv(1) == b""
        with recovered(source, uri):
            source.end()
            assert receiver.finish()["status"] == "completed"
    assert "it does not speak TLS" in caplog.text and "it showed no certificate" in caplog.text
