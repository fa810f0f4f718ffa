"""Migration URIs: an address that means the same when it is written again, or UsageError."""

from __future__ import annotations

import contextlib

from sharded_pc import address
from sharded_pc.errors import UsageError

TOKENS = (b"tcp:", b"unix:", b"fd:", b"exec:", b"file:", b",offset=", b"0x", b"[::1]", b":4444")


def one_input(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(UsageError):
        found = address.parse(text)
        assert address.parse(str(found)) == found
        if isinstance(found, address.FileAddress):
            assert 0 <= found.offset < 1 << 63, "no descriptor can be moved there"
