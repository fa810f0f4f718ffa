"""Keys and certificates: what is wrong with them is said at the start, with the file's name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_pc.address import parse
from sharded_pc.errors import UsageError
from sharded_pc.testing.certificates import CLIENT, Authority, openssl
from sharded_pc.transport.incoming import listen
from sharded_pc.transport.tls.credentials import HAS_PSK, PSK_KEYS, X509, Psk
from sharded_pc.transport.tls.door import Door
from sharded_pc.transport.tls.names import distinguished_name
from tests.certificates import certificates, credentials
from tests.receiver import Receiver
from tests.synthetic import WAIT_S, Background

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command")
needs_psk = pytest.mark.skipif(not HAS_PSK, reason="n/a: needs Python >= 3.13")


def check(folder: Path) -> str:
    """What is wrong with them, without the folder's name."""
    with pytest.raises(UsageError) as caught:
        X509(str(folder)).check()
    return str(caught.value).removeprefix(f"--tls-creds: {folder}/")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good files, to be spoilt."""
    return Path(shutil.copytree(certificates() / "server", tmp_path / "files"))


def test_good_files(folder):
    X509(str(folder)).check()


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_file_is_missing_or_rubbish(folder, name):
    (folder / name).write_text("rubbish")
    assert check(folder).startswith(f"{name}: no certificate")
    (folder / name).write_bytes(b"\xff\xfe")
    assert check(folder) == f"{name}: it is no PEM file"
    (folder / name).unlink()
    assert check(folder) == f"{name}: No such file or directory"


def test_a_key_that_may_not_be_read(folder):
    (folder / "server-key.pem").chmod(0)
    if os.geteuid():
        assert check(folder) == f"server-key.pem: Permission denied for user {os.geteuid()}"
    else:
        nobody = Background(lambda: _as_nobody(folder)).result()
        assert nobody.endswith("server-key.pem: Permission denied for user 65534\n")


def _as_nobody(folder: Path) -> str:
    for each in (folder, *folder.parents):
        if each.owner() == "root" and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o11)
    for name in ("ca-cert.pem", "server-cert.pem"):
        (folder / name).chmod(0o644)
    code = "import os, sys\nfrom sharded_pc.transport.tls.credentials import X509\n" \
           "os.setuid(65534)\nX509(sys.argv[1]).check()"  # fmt: skip
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S).stderr


def test_a_key_of_another_certificate(folder, tmp_path):
    other = Authority(tmp_path / "other").issue(tmp_path / "theirs", "server")
    shutil.copy(other / "server-key.pem", folder)
    assert check(folder) == "server-key.pem: this key is not that of server-cert.pem"


def test_an_encrypted_key(folder):
    plain, key = certificates() / "server" / "server-key.pem", folder / "server-key.pem"
    openssl("pkey", "-in", plain, "-aes256", "-passout", "pass:x", "-out", key)
    assert check(folder).startswith("server-key.pem: it is encrypted")


def test_a_certificate_of_another_authority(folder, tmp_path):
    Authority(tmp_path / "other").issue(folder, "server")
    shutil.copy(certificates() / "ca-cert.pem", folder)
    found = check(folder)
    assert found.startswith("server-cert.pem: ") and found.endswith("(judged by ca-cert.pem)")


def test_expired(tmp_path):
    young = Authority(tmp_path / "young")
    assert check(young.issue(tmp_path / "a", "server", days=-1)) == (
        "server-cert.pem: certificate has expired (judged by ca-cert.pem)"
    )
    old = Authority(tmp_path / "old", days=-1)
    assert check(old.issue(tmp_path / "b", "server")).startswith("ca-cert.pem: it has expired, ")


def test_a_certificate_for_something_else(tmp_path):
    files = Authority(tmp_path / "ca").issue(tmp_path / "files", "server", more=CLIENT)
    assert check(files).startswith("server-cert.pem: ")


@pytest.mark.skipif(HAS_PSK, reason="n/a: this Python has it")
def test_a_shared_key_wants_a_newer_python(tmp_path):
    with pytest.raises(UsageError, match=r"Python 3\.13 or newer, or certificates"):
        Psk(str(tmp_path)).check()


@needs_psk
@pytest.mark.parametrize("text, why", [
    ("", "no key is in it"), ("qemu", "line 1: expected USER:KEY"), ("qemu:xyz", "line 1"),
])  # fmt: skip
def test_a_bad_file_of_shared_keys(tmp_path, text, why):
    (tmp_path / PSK_KEYS).write_text(text)
    with pytest.raises(UsageError, match=why):
        Psk(str(tmp_path)).check()


@pytest.mark.parametrize("options, why", [
    (["--tls-authz", "CN=a"], "give --tls-creds DIR too"),
    (["--tls-creds", "/a", "--tls-psk", "/b"], "leave --tls-creds and --tls-authz out"),
    (["--tls-creds", "/nobody/there"], "/nobody/there/ca-cert.pem: No such file"),
])  # fmt: skip
def test_options(tmp_path, unique_name, options, why):
    receiver = Receiver(tmp_path, unique_name, None, *options, keep=False)
    done = subprocess.run(receiver.command(), capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2 and why in done.stderr


@pytest.mark.parametrize("uri", ["file:/dev/null", "exec:cat"])
def test_no_tls_without_a_socket(uri):
    with pytest.raises(UsageError, match="there is no TLS without a socket"):
        listen(parse(uri), door=Door(credentials()))


@pytest.mark.parametrize("subject, name", [
    ((("countryName", "GB"),) , "C=GB"),
    ((("countryName", "GB"), ("localityName", "L"), ("commonName", "a")), "CN=a,L=L,C=GB"),
    ((("commonName", 'a,b+c"\\<>; '),), r'CN=a\,b\+c\"\\\<\>\;\ '),
    ((("commonName", "#1"), ("serialNumber", " 2")), r"serialNumber=\ 2,CN=\#1"),
])  # fmt: skip
def test_distinguished_names(subject, name):
    """As GnuTLS writes them, and with it QEMU's authz objects."""
    assert distinguished_name((each,) for each in subject) == name
