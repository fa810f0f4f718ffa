"""Who is at the other end of a Unix socket, by the kernel's word (unix(7), SO_PEERCRED)."""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("iII")


class Peer(NamedTuple):
    """Who called connect() or listen(), with the effective ids of that moment."""

    pid: int
    uid: int
    gid: int

    @property
    def is_trusted(self) -> bool:
        """This user, who could trace us, and root, who can do anything."""
        return self.uid in (0, os.geteuid())


def origin_of(sock: socket.socket) -> str:
    """Where it comes from: all connections of one source come from there.  The plain end of a TLS
    connection remembers it."""
    if known := getattr(sock, "peer", ""):
        return known
    if sock.family == socket.AF_UNIX:
        return f"process {peer_of(sock).pid}"
    try:
        return sock.getpeername()[0]
    except OSError:  # reset already
        return "nowhere"


def peer_of(sock: socket.socket) -> Peer:
    """Of a connected Unix socket; also when the other end has gone."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer._make(_UCRED.unpack(raw))
