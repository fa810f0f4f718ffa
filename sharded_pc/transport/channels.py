"""The channels of a source's connection, and what the first bytes of each say.

==================  ==============================================================================
the stream's magic  the main channel
RECV_BITMAP         the main channel of a recovery, where that is awaited: its stream has no magic
                    (migration/migration.c, postcopy_do_resume)
multifd's magic     a channel of multifd (migration/multifd.c, MULTIFD_MAGIC)
a page's record     the channel of postcopy-preempt, which has no magic: from QEMU 8.0 on whatever
                    is none of the others is that (migration_ioc_process_incoming)
nothing yet         postcopy-preempt says nothing before a page is asked for.  7.2's source (and a
                    newer one with such a machine type) opens it at the start, a newer one at its
                    switch, after the first PONG
==================  ==============================================================================

The first byte alone tells them apart: 'Q', 0x08, 0x11, 0x00.  Bytes in, a kind out: no I/O here, so
that it does not matter how the bytes came (a socket, or what decrypts one).
"""

from __future__ import annotations

import dataclasses
import enum
import socket
import struct

from sharded_pc.wire import constants as c

SOURCE = struct.pack(">II", c.FILE_MAGIC, c.FILE_VERSION)
RECOVERY = struct.pack(">BH", c.Section.COMMAND, c.Cmd.RECV_BITMAP)
MULTIFD = struct.pack(">I", c.MULTIFD_MAGIC)
MOST_BYTES = len(SOURCE)
"""More of them say nothing more."""
_MAGICS = (SOURCE, MULTIFD, RECOVERY)
_RECORDS = (c.RamFlag.PAGE, c.RamFlag.ZERO, c.RamFlag.EOS)
"""What a channel of pages may begin with: the first page names its block."""


class Kind(enum.Enum):
    MAIN = "main"
    PREEMPT = "postcopy-preempt"
    MULTIFD = "multifd"


@dataclasses.dataclass(frozen=True)
class Channel:
    """One connected channel.  `sock` is non-blocking, nothing has been read from it, and it is
    closed by whoever took the channel.  `peer` says where it comes from."""

    kind: Kind
    sock: socket.socket
    peer: str


def kind_of(opening: bytes, main: bytes) -> Kind | None:
    """`main`: how the main channel begins here, SOURCE or RECOVERY.  None: a stranger."""
    if opening.startswith(main):
        return Kind.MAIN
    if opening.startswith(MULTIFD):
        return Kind.MULTIFD
    return Kind.PREEMPT if _is_record(opening) else None


def may_go_on(seen: bytes) -> bool:
    """The beginning of something known, not yet the whole."""
    if any(magic.startswith(seen) and magic != seen for magic in _MAGICS):
        return True
    return seen.startswith(b"\0") and len(seen) < MOST_BYTES


def _is_record(opening: bytes) -> bool:
    """be64 (offset | flags); no RAMBlock reaches so far that the first byte is anything but 0."""
    if len(opening) < MOST_BYTES or opening[0] != 0:
        return False
    return int.from_bytes(opening, "big") & 0xFFF in _RECORDS
