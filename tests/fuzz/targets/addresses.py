"""Migration URIs: an address that means the same when it is written again, or UsageError."""

from __future__ import annotations

import contextlib
import dataclasses

from sharded_pc import address
from sharded_pc.errors import UsageError

TOKENS = (
    b"tcp:",
    b"unix:",
    b"fd:",
    b"exec:",
    b"file:",
    b",offset=",
    b"0x",
    b"[::1]",
    b":4444",
    b",keep-alive",
    b"=off",
    b"-idle=",
    b"-count=",
)


def one_input(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(UsageError):
        found = address.parse(text)
        assert address.parse(str(found)) == _told(found)
        if isinstance(found, address.FileAddress):
            assert 0 <= found.offset < 1 << 63, "no descriptor can be moved there"


def _told(found: address.Address) -> address.Address:
    """How we watch a source is not the source's business: it is not written."""
    if isinstance(found, address.TcpAddress):
        return dataclasses.replace(found, keep_alive=address.KeepAlive())
    return found
