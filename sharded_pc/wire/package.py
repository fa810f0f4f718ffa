"""The content of a PACKAGED blob: LISTEN, device sections, PING 3, RUN.

Device sections have no length, so only both ends can be understood: the head is one command, the
tail is commands, and what lies between is opaque.  Newer sources (10.2) put one more PING there.
"""

from __future__ import annotations

import struct

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.wire import events
from sharded_pc.wire.constants import Cmd, Section

LISTEN = struct.pack(">BHH", Section.COMMAND, Cmd.POSTCOPY_LISTEN, 0)
RUN = struct.pack(">BHH", Section.COMMAND, Cmd.POSTCOPY_RUN, 0)
PING = struct.pack(">BHH", Section.COMMAND, Cmd.PING, 4)
MOST_PINGS = 4


def parse(blob: bytes) -> list:
    """Events of a package, in order; RemoteProtocolError unless head and tail are QEMU's."""
    if not blob.startswith(LISTEN):
        raise RemoteProtocolError(
            f"package of {len(blob)} bytes begins with {blob[:5].hex()}, expected POSTCOPY_LISTEN"
        )
    if not blob.endswith(RUN) or len(blob) < len(LISTEN) + len(RUN):
        raise RemoteProtocolError(
            f"package of {len(blob)} bytes ends with {blob[-5:].hex()}, expected POSTCOPY_RUN"
        )
    body = blob[len(LISTEN) : -len(RUN)]
    pings: list[events.Ping] = []
    while len(pings) < MOST_PINGS and body[-9:-4] == PING:
        pings.insert(0, events.Ping(int.from_bytes(body[-4:], "big")))
        body = body[:-9]
    return [
        events.PostcopyListen(),
        events.PackagedDevices(bytes(body)),
        *pings,
        events.PostcopyRun(),
    ]
