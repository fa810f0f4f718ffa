"""Keys and certificates, by QEMU's file names and rules (crypto/tlscredsx509.c, tlscredspsk.c).

`check()` is for the start, when somebody looks: it names the file and what is wrong with it.
`context()` is made anew for each connection, so a renewed certificate counts from the next one on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sharded_pc.errors import UsageError
from sharded_pc.transport.tls.names import distinguished_name

CA_CERT, CA_CRL = "ca-cert.pem", "ca-crl.pem"
SERVER_CERT, SERVER_KEY = "server-cert.pem", "server-key.pem"
PSK_KEYS = "keys.psk"
PSK_CIPHERS = "ECDHE+PSK+AESGCM:DHE+PSK+AESGCM:PSK+AESGCM:ECDHE+PSK:DHE+PSK:PSK"
HAS_PSK = hasattr(ssl.SSLContext, "set_psk_server_callback")


@dataclasses.dataclass(frozen=True, slots=True)
class X509:
    """`--tls-creds`: tls-creds-x509, with verify-peer=on unless said otherwise.  `allowed`:
    distinguished names of clients, (): every one whose certificate the CA has signed."""

    folder: str
    allowed: tuple[str, ...] = ()
    verify_peer: bool = True
    """a client must have a certificate"""

    def check(self) -> None:
        """UsageError."""
        context = self.context()
        self._check_dates(context)
        try:
            _meet(context, self._client())
        except ssl.SSLCertVerificationError as error:
            raise self._wrong(
                SERVER_CERT, f"{error.verify_message} (judged by {CA_CERT})"
            ) from None
        except ssl.SSLError as error:
            raise self._wrong(SERVER_CERT, _reason(error)) from None

    def context(self) -> ssl.SSLContext:
        """UsageError."""
        context = _context()
        context.verify_mode = ssl.CERT_REQUIRED if self.verify_peer else ssl.CERT_NONE
        self._trust(context)
        self._read(SERVER_CERT)
        # Elsewhere, to find out whether it is one: of a pair OpenSSL does not say which is bad.
        self._try(SERVER_CERT, _context().load_verify_locations, self._path(SERVER_CERT))
        self._read(SERVER_KEY)
        self._try(SERVER_KEY, self._load_key, context)
        return context

    def admit(self, tls: ssl.SSLObject) -> str:
        """Who it is; PermissionError if it may not come in."""
        certificate = tls.getpeercert()
        name = distinguished_name(certificate["subject"]) if certificate else ""
        if self.allowed and name not in self.allowed:
            raise PermissionError(f"its certificate's name is not in --tls-authz: {name}")
        return name

    def _trust(self, context: ssl.SSLContext) -> None:
        self._read(CA_CERT)
        self._try(CA_CERT, context.load_verify_locations, self._path(CA_CERT))
        if not context.get_ca_certs():
            raise self._wrong(CA_CERT, "no certificate of an authority is in it (CA:TRUE)")
        if self._path(CA_CRL).exists():
            self._read(CA_CRL)
            self._try(CA_CRL, context.load_verify_locations, self._path(CA_CRL))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF

    def _load_key(self, context: ssl.SSLContext) -> None:
        def no_password() -> str:
            raise self._wrong(SERVER_KEY, "it is encrypted: decrypt it with openssl pkey")

        certificate, key = self._path(SERVER_CERT), self._path(SERVER_KEY)
        context.load_cert_chain(certificate, key, no_password)

    def _client(self) -> ssl.SSLContext:
        """One who trusts the CA, as the source does."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # which name the source is told is not known here
        self._trust(context)
        return context

    def _check_dates(self, context: ssl.SSLContext) -> None:
        """Of authorities: OpenSSL does not tell whose date it is that is wrong."""
        now = time.time()
        for each in context.get_ca_certs():
            if ssl.cert_time_to_seconds(each["notAfter"]) < now:
                raise self._wrong(CA_CERT, f"it has expired, {each['notAfter']}")
            if ssl.cert_time_to_seconds(each["notBefore"]) > now:
                raise self._wrong(CA_CERT, f"it is not valid before {each['notBefore']}")

    def _try(self, name: str, load: Callable, argument: object) -> None:
        try:
            load(argument)
        except ssl.SSLError as error:
            raise self._wrong(name, _reason(error)) from None

    def _read(self, name: str) -> str:
        return _read("--tls-creds", self._path(name))

    def _path(self, name: str) -> Path:
        return Path(self.folder, name)

    def _wrong(self, name: str, why: str) -> UsageError:
        return UsageError(f"--tls-creds: {self._path(name)}: {why}")


@dataclasses.dataclass(frozen=True, slots=True)
class Psk:
    """`--tls-psk`: tls-creds-psk.  Every user of the file is let in, as by QEMU: its `username` is
    refused with `endpoint=server`, and says at the source which line of the file counts."""

    folder: str

    def check(self) -> None:
        """UsageError."""
        if not HAS_PSK:
            raise UsageError(
                "--tls-psk: this Python cannot do it: use Python 3.13 or newer, or certificates "
                "(--tls-creds)"
            )
        self._keys()

    def context(self) -> ssl.SSLContext:
        """UsageError."""
        keys, context = self._keys(), _context(_PskContext)

        def key_of(user: str | None) -> bytes:
            context.user = user or ""
            return keys.get(context.user, b"")

        context.set_ciphers(PSK_CIPHERS)
        context.set_psk_server_callback(key_of)
        return context

    def admit(self, tls: ssl.SSLObject) -> str:
        """By whose key: having it is all that counts."""
        assert isinstance(tls.context, _PskContext)
        return f"by the key of {tls.context.user}"

    def _keys(self) -> dict[str, bytes]:
        path = Path(self.folder, PSK_KEYS)
        keys = {}
        for number, line in enumerate(_read("--tls-psk", path).splitlines(), 1):
            user, colon, key = line.rpartition(":")
            if not colon or not re.fullmatch(r"([0-9a-fA-F]{2})+", key.strip()):
                raise UsageError(f"--tls-psk: {path}, line {number}: expected USER:KEY, KEY in hex")
            keys[user] = bytes.fromhex(key.strip())
        if not keys:
            raise UsageError(f"--tls-psk: {path}: no key is in it; psktool makes one")
        return keys


Credentials = X509 | Psk


class _PskContext(ssl.SSLContext):
    """Of one connection; `user`: whose key its peer asked for."""

    user = ""


T = TypeVar("T", bound=ssl.SSLContext)


def _context(kind: type[T] = ssl.SSLContext) -> T:
    context = kind(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A resumed session would bring nobody's certificate, and no source asks for one.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    return context


def _meet(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A handshake in memory up to where the client has judged the server; SSLError is the client's.
    What the server thinks of a client without a certificate does not count."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(down, up)
    ours = server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        with contextlib.suppress(ssl.SSLWantReadError):
            theirs.do_handshake()
            return
        with contextlib.suppress(ssl.SSLWantReadError):
            ours.do_handshake()


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise UsageError(f"{option}: {path}: it is no PEM file") from None
    except OSError as error:
        user = f" for user {os.geteuid()}" if isinstance(error, PermissionError) else ""
        raise UsageError(f"{option}: {path}: {error.strerror}{user}") from None


_REASONS = {
    "KEY_VALUES_MISMATCH": f"this key is not that of {SERVER_CERT}",
    "NO_START_LINE": "no certificate or key is in it (PEM)",
    "NO_CERTIFICATE_OR_CRL_FOUND": "no certificate is in it (PEM)",
}


def _reason(error: ssl.SSLError) -> str:
    text = (error.reason or "no certificate or key can be read from it (PEM)").replace("_", " ")
    return _REASONS.get(error.reason or "", text.lower())
