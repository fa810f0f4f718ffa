"""Keys and certificates under QEMU's file names, made by openssl(1): for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from sharded_pc.errors import HostError

OPENSSL_SECONDS = 30.0
HOST = "receiver.test"
SOURCE_NAME = "CN=source,O=Tests,C=DE"
AUTHORITY = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
SERVER = f"subjectAltName=DNS:{HOST},IP:127.0.0.1\nextendedKeyUsage=serverAuth\n"
CLIENT = "extendedKeyUsage=clientAuth\n"
LEAF = "basicConstraints=critical,CA:FALSE\nkeyUsage=digitalSignature,keyEncipherment\n"
"""QEMU 10.0.2 wants key encipherment, though an elliptic key never does it."""


def openssl(*arguments: str | Path, text: str = "") -> None:
    """HostError."""
    try:
        done = subprocess.run(
            ["openssl", *map(str, arguments)],
            input=text, capture_output=True, text=True, timeout=OPENSSL_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"make certificates by openssl(1): {error}") from None
    if done.returncode:
        raise HostError(f"openssl {arguments[0]}: {done.stderr.strip()}")


class Authority:
    """A CA; `issue` makes keys and certificates that it has signed."""

    def __init__(self, folder: Path, days: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate, self.key = folder / "ca-cert.pem", folder / "ca-key.pem"
        self._sign(self.key, self.certificate, "/CN=Tests' CA", AUTHORITY, days, "-signkey")

    def issue(self, folder: Path, what: str, days: int = 2, more: str | None = None) -> Path:
        """`server` or `client`; the folder, which has the CA's certificate, too."""
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(shutil.SameFileError):
            shutil.copy(self.certificate, folder / "ca-cert.pem")
        subject = "/C=DE/O=Tests/CN=" + ("receiver" if what == "server" else "source")
        usage = more or (SERVER if what == "server" else CLIENT)
        key, certificate = folder / f"{what}-key.pem", folder / f"{what}-cert.pem"
        self._sign(key, certificate, subject, LEAF + usage, days, "-CAkey")
        return folder

    def _sign(
        self, key: Path, certificate: Path, subject: str, usage: str, days: int, by: str
    ) -> None:
        request, extensions = key.with_suffix(".csr"), key.with_suffix(".ext")
        extensions.write_text(usage)
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", *curve, "-keyout", key, "-subj", subject, "-out", request)
        signer = (by, self.key) if by == "-signkey" else ("-CA", self.certificate, by, self.key)
        serial = ("-set_serial", f"0x{os.urandom(8).hex()}")
        openssl("x509", "-req", "-in", request, "-days", str(days), *serial, *signer,
                "-extfile", extensions, "-out", certificate)  # fmt: skip

    def revoke(self, folder: Path) -> None:
        """A list of the revoked, `folder`'s client among them, for the receiver."""
        base = self.certificate.parent
        config = base / "ca.cnf"
        config.write_text(
            f"[ca]\ndefault_ca=this\n[this]\ndatabase={base}/index\ndefault_md=sha256\n"
            "default_crl_days=2\n"
        )
        (base / "index").write_text("")
        ours = ("-config", config, "-cert", self.certificate, "-keyfile", self.key)
        openssl("ca", *ours, "-revoke", folder / "client-cert.pem")
        openssl("ca", *ours, "-gencrl", "-out", base / "ca-crl.pem")
