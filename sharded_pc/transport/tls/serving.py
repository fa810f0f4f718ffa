"""The process in which TLS ends: it has the keys, and a thread for each connection.

The coordinator (`door.py`) sends {"peer": ...} with three descriptors: the connection, the plain
end, and the leash.  On the leash goes what there is to say of that connection, a JSON object
each: {"name": who it is} when it is through, or {"refused": why}; {"broken": why} before the plain
end ends, with null if it does in order.  PING is answered by one byte.  When the coordinator closes
its end of the pipe, what was accepted is sent to its end, and the process ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from multiprocessing.connection import Connection

from sharded_pc.errors import UsageError
from sharded_pc.transport.fds import Inbox, receive_message
from sharded_pc.transport.tls.credentials import Credentials
from sharded_pc.transport.tls.pump import FLUSH_SECONDS, Pump
from sharded_pc.transport.tls.refusals import HANDSHAKE_SECONDS, why_refused
from sharded_pc.transport.tls.wire import LINGER_SECONDS, ClosedEarly, TlsWire

PING = {"ping": True}


def main(conn: Connection, credentials: Credentials) -> None:
    """Entry of the process."""
    threads = []
    with socket.socket(fileno=conn.fileno()) as control:
        inbox = Inbox()
        while (message := receive_message(control, inbox)) is not None:
            if message == PING:
                with contextlib.suppress(OSError):  # nobody asks any more
                    control.send(b".")
                continue
            wire, plain, leash = map(_socket, inbox.take_fds())
            thread = threading.Thread(target=_serve, args=(wire, plain, leash, credentials))
            thread.daemon = True
            thread.start()
            threads = [each for each in threads if each.is_alive()] + [thread]
        control.detach()
    deadline = time.monotonic() + FLUSH_SECONDS + LINGER_SECONDS
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))


def _socket(fd: int) -> socket.socket:
    return socket.socket(fileno=fd)


def _serve(
    sock: socket.socket, plain: socket.socket, leash: socket.socket, credentials: Credentials
) -> None:
    with leash, contextlib.closing(sock), contextlib.closing(plain):
        wire = _opened(sock, leash, credentials)
        if wire is None:
            return
        pump = Pump(wire, plain)
        pump.on_end = lambda why: _say(leash, broken=why)
        pump.run()
        pump.close()


def _opened(sock: socket.socket, leash: socket.socket, credentials: Credentials) -> TlsWire | None:
    """After the handshake; None: it was refused, and that is told."""
    wire = None
    try:
        wire = TlsWire(sock, credentials.context())
        wire.handshake(HANDSHAKE_SECONDS)
        name = credentials.admit(wire.tls)
    except (OSError, ClosedEarly, UsageError, ssl.SSLError) as error:
        opening = b"" if wire is None else wire.opening
        _say(leash, refused=why_refused(error, opening, credentials))
        if wire is not None:
            wire.linger()
        return None
    _say(leash, name=name)
    return wire


def _say(leash: socket.socket, **what: str | None) -> None:
    with contextlib.suppress(OSError):  # nobody asks any more
        leash.send(json.dumps(what).encode())
