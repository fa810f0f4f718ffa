"""Numbers on the wire (QEMU migration/savevm.h, ram.c, migration.h) and our limits."""

from __future__ import annotations

import enum

FILE_MAGIC = 0x5145564D
"""'QEVM'"""
FILE_VERSION = 3
MULTIFD_MAGIC = 0x11223344
RAM_SECTION_VERSION = 4
TARGET_PAGE_BITS = 12


class Section(enum.IntEnum):
    """QEMU_VM_*: the byte that opens a section."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class Cmd(enum.IntEnum):
    """MIG_CMD_*: source to destination."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


COMMAND_LENGTHS: dict[Cmd, tuple[int, ...]] = {
    Cmd.OPEN_RETURN_PATH: (0,),
    Cmd.PING: (4,),
    Cmd.POSTCOPY_ADVISE: (0, 16),
    Cmd.POSTCOPY_LISTEN: (0,),
    Cmd.POSTCOPY_RUN: (0,),
    Cmd.PACKAGED: (4,),
    Cmd.ENABLE_COLO: (0,),
    Cmd.POSTCOPY_RESUME: (0,),
    Cmd.SWITCHOVER_START: (0,),
}
"""Payload bytes of commands with a fixed length; the others check their own."""


class RamFlag(enum.IntFlag):
    """RAM_SAVE_FLAG_*: the low 12 bits of a record's be64."""

    FULL = 0x01
    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    HOOK = 0x80
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


UNSUPPORTED_RECORDS = {
    RamFlag.FULL: "an obsolete 'full' record",
    RamFlag.HOOK: "an RDMA record (migrate over tcp: or unix:)",
}


class Rp(enum.IntEnum):
    """MIG_RP_MSG_*: destination to source."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


MAX_DISCARD_RANGES = 12
"""Ranges in one POSTCOPY_RAM_DISCARD (QEMU MAX_DISCARDS_PER_COMMAND)."""

# Our limits: what the stream may make us allocate.
MAX_PACKAGE_BYTES = 256 << 20
"""Device state in one package; QEMU's format allows 4 GiB, real guests send kilobytes."""
MAX_DEVICES_BYTES = 256 << 20
"""Device state after RAM when a migration completes in precopy."""
MAX_DESCRIPTION_BYTES = 16 << 20
"""A VMDESCRIPTION's JSON; real ones have some hundred kilobytes."""
MAX_DESCRIPTIONS = 64
"""Places in device state that look like the beginning of one; in random bytes there is hardly one,
and each may cost a look at all of its JSON."""
MAX_BLOCKS = 250
"""RAMBlocks of one guest (control.h SP_MAX_BLOCKS)."""
MAX_RAM_BYTES = 1 << 46
"""64 TiB of guest RAM: more is a corrupt length."""
MAX_NAME_BYTES = 4096
"""A machine name; QEMU's longest is some 30 bytes."""
MAX_CAPABILITIES = 64
