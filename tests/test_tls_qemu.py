"""A real QEMU as the source, with tls-creds-x509: received, resumed, cut and recovered."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from sharded_pc.testing.certificates import HOST, SOURCE_NAME
from sharded_pc.transport.tls.credentials import HAS_PSK
from tests.certificates import certificates
from tests.qemu import wait_until
from tests.qemu.guest_image import MIB
from tests.qemu.vm import QemuVm
from tests.receiver import Receiver
from tests.test_preempt_qemu import ask_for_preempt, asked_for
from tests.test_receive_multifd_qemu import check_ram, migrated
from tests.test_receive_qemu import begin_precopy, booted, check_equal, switch
from tests.test_recovery_qemu import check_end, operated

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(150),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command"),
]  # fmt: skip


def speak_tls(source: QemuVm, folder: Path | None = None) -> None:
    """Its migrations are inside TLS from now on."""
    folder = folder or certificates() / "client"
    source.qmp("object-add", qom_type="tls-creds-x509", id="tls0", dir=str(folder),
               endpoint="client", verify_peer=True)  # fmt: skip
    source.set_parameters(tls_creds="tls0", tls_hostname=HOST)


def options(*more: str) -> tuple[str, ...]:
    return ("--tls-creds", str(certificates() / "server"), *more)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_received(tmp_path, unique_name, binary, kind):
    incoming = None if kind == "unix" else "tcp:127.0.0.1:0"
    ours = options("--tls-authz", SOURCE_NAME)
    with booted(tmp_path, binary) as source:
        speak_tls(source)
        with Receiver(tmp_path, unique_name, incoming, *ours) as receiver:
            begin_precopy(source, receiver.uri())
            switch(source)
            check_equal(source, receiver, receiver.finish(), requests=False)


@pytest.mark.usefixtures("placement")
def test_resumed_cut_and_recovered(tmp_path, unique_name, binary):
    """A guest runs here while its RAM comes; over two more connections after the first."""

    def prepare(vms) -> None:
        speak_tls(vms.source)

    with operated(tmp_path, unique_name, binary, *options(), prepare=prepare) as operator:
        for by, uri in (("source", None), ("receiver", "tcp:127.0.0.1:0")):
            operator.cut(by)
            operator.recover(uri)
        check_end(operator)


def test_preempt_cut_and_recovered(tmp_path, unique_name, newer):
    """Both channels, twice: the second one is opened at the switch, and shakes hands then."""

    def prepare(vms) -> None:
        speak_tls(vms.source)
        ask_for_preempt(vms)

    with operated(tmp_path, unique_name, newer, *options(), prepare=prepare) as operator:
        wait_until(lambda: asked_for(operator) > 0, "a page")
        operator.cut("source")
        before = asked_for(operator)
        operator.recover()
        wait_until(lambda: asked_for(operator) > before, "another")
        check_end(operator)


def test_multifd(tmp_path, unique_name, newer):
    """Each channel has its own TLS; a guest that writes keeps all of them at work."""
    with (
        booted(tmp_path, newer, writes=True, smp=2) as source,
        Receiver(tmp_path, unique_name, None, *options()) as receiver,
    ):
        speak_tls(source)
        check_ram(source, receiver, migrated(source, receiver, 3))


def test_a_source_without_tls_tries_again(tmp_path, unique_name, binary):
    """Its guest goes on, both are told why; with TLS the same receiver takes it."""
    with (
        booted(tmp_path, binary) as source,
        Receiver(tmp_path, unique_name, None, *options()) as receiver,
    ):
        begin_precopy(source, receiver.uri())
        source.wait_migration("failed")
        told = "it does not speak TLS, which this receiver was told to ask for"
        wait_until(lambda: told in receiver.stderr(), told)
        speak_tls(source)
        begin_precopy(source, receiver.uri(), rate=64 * MIB)
        switch(source)
        check_equal(source, receiver, receiver.finish(), requests=False)


def test_a_source_without_a_certificate(tmp_path, unique_name, binary):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(certificates() / "ca-cert.pem", folder)
    with booted(tmp_path, binary) as source:
        speak_tls(source, folder)
        with Receiver(tmp_path, unique_name, None, *options(), keep=False) as receiver:
            begin_precopy(source, receiver.uri())
            wait_until(lambda: "it showed no certificate" in receiver.stderr(), "a line")
            source.wait_migration("failed")


def test_a_source_with_tls_at_a_receiver_without(tmp_path, unique_name, binary):
    with booted(tmp_path, binary) as source:
        speak_tls(source)
        with Receiver(tmp_path, unique_name, keep=False) as receiver:
            begin_precopy(source, receiver.uri())
            source.wait_migration("failed")
            told = "it speaks TLS: start this receiver with --tls-creds"
            wait_until(lambda: told in receiver.stderr(), told)


@pytest.mark.skipif(not HAS_PSK, reason="n/a: needs Python >= 3.13")
@pytest.mark.parametrize("user", ["qemu", "other"])
def test_a_shared_key(tmp_path, unique_name, binary, user):
    """QEMU's source is the user `qemu` if it is given no other; its destination takes each."""
    (tmp_path / "keys.psk").write_text("qemu:00112233445566778899aabbccddeeff\nother:aabbccdd\n")
    more = {} if user == "qemu" else {"username": user}
    options = ("--tls-psk", str(tmp_path), "--log-level", "info")
    with booted(tmp_path, binary) as source:
        source.qmp("object-add", qom_type="tls-creds-psk", id="tls0", dir=str(tmp_path),
                   endpoint="client", **more)  # fmt: skip
        source.set_parameters(tls_creds="tls0")
        with Receiver(tmp_path, unique_name, None, *options) as receiver:
            begin_precopy(source, receiver.uri())
            switch(source)
            check_equal(source, receiver, receiver.finish(), requests=False)
            assert f"by the key of {user}" in receiver.stderr()
