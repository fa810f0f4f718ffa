"""The process in which TLS ends: it has the keys, and a thread for each connection.

The coordinator (`door.py`) sends {"peer": ...} with three descriptors: the connection, the plain
end, and the leash.  On the leash goes what there is to say of that connection, a JSON object
each: {"name": who it is} when it is through, or {"refused": why}; {"broken": why} before the plain
end ends, with null if it does in order.  When the coordinator closes its end of the pipe, what was
accepted is sent to its end, and the process ends.
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
from sharded_pc.native.shard import end_with_parent
from sharded_pc.transport.fds import Inbox, receive_message
from sharded_pc.transport.tls.credentials import Credentials
from sharded_pc.transport.tls.pump import FLUSH_SECONDS, LINGER_SECONDS, ClosedEarly, Pump
from sharded_pc.transport.tls.refusals import HANDSHAKE_SECONDS, why_refused


def main(conn: Connection, credentials: Credentials) -> None:
    """Entry of the process."""
    end_with_parent()
    threads = []
    with socket.socket(fileno=conn.fileno()) as control:
        inbox = Inbox()
        while receive_message(control, inbox) is not None:
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
    wire: socket.socket, plain: socket.socket, leash: socket.socket, credentials: Credentials
) -> None:
    with leash, contextlib.closing(wire), contextlib.closing(plain):
        pump = _opened(wire, plain, leash, credentials)
        if pump is None:
            return
        pump.on_end = lambda why: _say(leash, broken=why)
        pump.run()
        pump.close()


def _opened(
    wire: socket.socket, plain: socket.socket, leash: socket.socket, credentials: Credentials
) -> Pump | None:
    """After the handshake; None: it was refused, and that is told."""
    pump = None
    try:
        pump = Pump(wire, plain, credentials.context())
        pump.handshake(HANDSHAKE_SECONDS)
        name = credentials.admit(pump.tls)
    except (OSError, ClosedEarly, UsageError, ssl.SSLError) as error:
        opening = b"" if pump is None else pump.opening
        _say(leash, refused=why_refused(error, opening, credentials))
        if pump is not None:
            pump.linger()
        return None
    _say(leash, name=name)
    return pump


def _say(leash: socket.socket, **what: str | None) -> None:
    with contextlib.suppress(OSError):  # nobody asks any more
        leash.send(json.dumps(what).encode())
