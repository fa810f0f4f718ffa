"""Why a peer did not get through the handshake, in words for whoever has to mend it."""

from __future__ import annotations

import ssl

from sharded_pc.errors import UsageError
from sharded_pc.transport.candidates import TLS
from sharded_pc.transport.tls.credentials import CA_CERT, SERVER_CERT, X509, Credentials
from sharded_pc.transport.tls.wire import ClosedEarly

HANDSHAKE_SECONDS = 30.0

NOT_TLS = (
    "it does not speak TLS, which this receiver was told to ask for: set tls-creds at the source, "
    "or start the receiver without --tls-creds and --tls-psk"
)
NO_CERTIFICATE = (
    "it showed no certificate: client-cert.pem and client-key.pem are missing in the folder of the "
    "source's tls-creds-x509"
)


def why_refused(error: Exception, opening: bytes, credentials: Credentials) -> str:
    """`opening`: the first bytes that the peer sent."""
    if opening and not TLS.startswith(opening[:2]):
        return NOT_TLS
    match error:
        case TimeoutError():
            return f"its TLS handshake took more than {HANDSHAKE_SECONDS:g} s"
        case ClosedEarly() | ConnectionResetError() | BrokenPipeError():
            return "it closed in the middle of the TLS handshake" if opening else CLOSED
        case ssl.SSLCertVerificationError():
            return f"its certificate was refused: {error.verify_message} ({_judge(credentials)})"
        case ssl.SSLError():
            return _handshake_failed(error.reason or str(error), credentials)
        case UsageError() | PermissionError():
            return str(error)
    return f"its TLS handshake failed: {error}"


CLOSED = "it closed without a word"


def _judge(credentials: Credentials) -> str:
    assert isinstance(credentials, X509)
    return f"judged by {credentials.folder}/{CA_CERT}"


def _handshake_failed(reason: str, credentials: Credentials) -> str:
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return NO_CERTIFICATE
    text = f"its TLS handshake failed: {reason.replace('_', ' ').lower()}"
    if isinstance(credentials, X509):
        if "ALERT" in reason:
            folder = credentials.folder
            text += (
                f" (the source does not take {folder}/{SERVER_CERT}: has it the same {CA_CERT}?)"
            )
        return text
    return f"{text} (has the source the same key, under the same user name?)"
