"""Migration streams that must be refused, with the text and the stream offset that a user reads."""

from __future__ import annotations

import dataclasses
import struct

from sharded_pc.wire import writer as w
from sharded_pc.wire.constants import (
    MAX_BLOCKS,
    MAX_CAPABILITIES,
    MAX_PACKAGE_BYTES,
    MAX_RAM_BYTES,
    Cmd,
    RamFlag,
    Section,
)
from sharded_pc.wire.package import LISTEN, RUN
from tests.stream_cases import DATA, DEVICE, END, HEAD, READY, capabilities, subsection


@dataclasses.dataclass(frozen=True, slots=True)
class Bad:
    name: str
    stream: bytes
    error: str
    at: int


def block_list(total: int, *blocks: tuple[str, int]) -> bytes:
    """A START section up to the end of the block list."""
    out = struct.pack(">BI", Section.START, 2) + b"\x03ram" + struct.pack(">II", 0, 4)
    out += struct.pack(">Q", total | RamFlag.MEM_SIZE)
    for name, size in blocks:
        raw = name.encode()
        out += bytes([len(raw)]) + raw + struct.pack(">Q", size)
    return out


def section(kind: Section, number: int, rest: bytes = b"") -> bytes:
    return struct.pack(">BI", kind, number) + rest


def start(name: str, version: int = 4, instance: int = 0) -> bytes:
    raw = name.encode()
    return section(
        Section.START, 7, bytes([len(raw)]) + raw + struct.pack(">II", instance, version)
    )


def discard(*parts: bytes) -> bytes:
    return w.command(Cmd.POSTCOPY_RAM_DISCARD, b"".join(parts))


PAIR = struct.pack(">QQ", 0x1000, 0x2000)


def _behind(ready: bytes, *rows: tuple[str, bytes, str]) -> list[Bad]:
    """The section that follows `ready` is refused, at its offset."""
    return [Bad(name, ready + stream, error, len(ready)) for name, stream, error in rows]


def _in_block_list(*rows: tuple[str, bytes, str]) -> list[Bad]:
    """The error is the MEM_SIZE record's."""
    at = len(HEAD) + len(block_list(0)) - 8
    return [Bad(name, HEAD + stream, error, at) for name, stream, error in rows]


_WRONG_LENGTHS = {
    Cmd.OPEN_RETURN_PATH: ("0", 1),
    Cmd.PING: ("4", 3),
    Cmd.POSTCOPY_ADVISE: ("0 or 16", 8),
    Cmd.POSTCOPY_LISTEN: ("0", 4),
    Cmd.POSTCOPY_RUN: ("0", 513),
    Cmd.PACKAGED: ("4", 8),
    Cmd.ENABLE_COLO: ("0", 1),
    Cmd.POSTCOPY_RESUME: ("0", 1),
    Cmd.SWITCHOVER_START: ("0", 2),
}
_RECOVERY = "a recovery of a paused migration, which this receiver is not in"
_LENGTHLESS = "cannot be skipped: its length is not in the stream; "
_CANNOT_SKIP = f"{_LENGTHLESS}start the source without that device"


def _package(blob: bytes) -> bytes:
    return w.command(Cmd.PACKAGED, struct.pack(">I", len(blob))) + blob


BAD = (
    Bad("magic", b"QEVN" + bytes(4),
        "not a migration stream: magic 0x5145564e, expected 0x5145564d", 0),
    Bad("version 2", w.header()[:7] + b"\x02", "stream version 2, expected 3", 4),
    *_behind(
        w.header(),
        ("machine name of 0 bytes", b"\x07\0\0\0\0", "machine name of 0 bytes, expected 1..4096"),
        ("machine name too long", b"\x07\0\0\x10\x01",
         "machine name of 4097 bytes, expected 1..4096"),
    ),
    *_behind(
        HEAD,
        ("unknown section", b"\x09", "unknown section type 0x09"),
        ("a description first", b"\x06", "unknown section type 0x06"),
        ("a footer first", section(Section.FOOTER, 2), "unknown section type 0x7e"),
        ("unknown subsection", subsection("configuration/colour", b""),
         "unknown subsection 'configuration/colour'"),
        ("subsection without a name", bytes([Section.SUBSECTION, 0]),
         "subsection with an empty name"),
        ("page bits", subsection("configuration/target-page-bits", struct.pack(">I", 14)),
         "target pages of 2^14 bytes, expected 2^12"),
        ("x-ignore-shared", capabilities("x-ignore-shared"),
         "the source uses capability 'x-ignore-shared': its shared blocks would not be sent; "
         "turn it off"),
        ("mapped-ram", capabilities("rdma-pin-all", "mapped-ram"),
         "the source uses capability 'mapped-ram': its pages are not in the stream; turn it off"),
        ("too many capabilities", capabilities(*["x"] * (MAX_CAPABILITIES + 1)),
         "65 capabilities, expected at most 64"),
        ("START of a device", start("slirp", 4, 3),
         f"section of device 'slirp' (instance 3) {_CANNOT_SKIP}"),
        ("START of dirty bitmaps", start("dirty-bitmap"),
         f"section of device 'dirty-bitmap' (instance 0) {_LENGTHLESS}"
         f"turn the source's dirty-bitmaps capability off"),
        ("START of block migration", start("block"),
         f"section of device 'block' (instance 0) {_LENGTHLESS}"
         f"turn the source's block capability off, storage is migrated apart"),
        ("START of VFIO", start("0000:00:02.0/vfio"),
         f"section of device '0000:00:02.0/vfio' (instance 0) {_LENGTHLESS}"
         f"unplug that passed-through device at the source before the migration"),
        ("virtio-mem before RAM", w.full_section(3, "0000:00:03.0/virtio-mem-device-early", b""),
         f"state of device '0000:00:03.0/virtio-mem-device-early' (section 3) before the end of "
         f"RAM {_LENGTHLESS}the memory it has plugged is not in the stream; use pc-dimm at the "
         f"source"),
        ("START without a name", section(Section.START, 7, b"\0"), "section with an empty name"),
        ("ram of version 3", start("ram", 3),
         "section 'ram' with version 3, expected one of version 4"),
        ("PART before START", section(Section.PART, 2),
         "PART of unknown section 2 (only 'ram' sections can be read)"),
        ("FULL before RAM", w.full_section(3, "timer", b""),
         f"state of device 'timer' (section 3) before the end of RAM {_CANNOT_SKIP}"),
    ),
    *_behind(
        READY,
        ("ram twice", start("ram"), "section 'ram' a second time, expected one of version 4"),
        ("PART of another section", section(Section.PART, 3),
         "PART of unknown section 3 (only 'ram' sections can be read)"),
        ("END of another section", section(Section.END, 3),
         "END of unknown section 3 (only 'ram' sections can be read)"),
        ("FULL before the end of RAM", DEVICE,
         f"state of device 'timer' (section 3) before the end of RAM {_CANNOT_SKIP}"),
        ("wrong footer mark", section(Section.PART, 2, w.eos() + b"\x7f\0\0\0\2"),
         "section 'ram' ends with 0x7f, expected a footer"),
        ("wrong footer id", section(Section.PART, 2, w.eos() + b"\x7e\0\0\0\3"),
         "footer of section 3, expected 2"),
        ("unknown command", w.command(12, b"abc"), "unknown command 0xc of 3 bytes"),
        ("command 0", w.command(0), "unknown command 0x0 of 0 bytes"),
        *((f"{cmd.name} of {wrong} bytes", w.command(cmd, bytes(wrong)),
           f"{cmd.name} of {wrong} bytes, expected {right}")
          for cmd, (right, wrong) in _WRONG_LENGTHS.items()),
        ("LISTEN outside a package", LISTEN, "PostcopyListen outside a package"),
        ("RUN outside a package", RUN, "PostcopyRun outside a package"),
        ("COLO", w.command(Cmd.ENABLE_COLO),
         "ENABLE_COLO: the source asks for COLO replication "
         "(turn the source's x-colo capability off)"),
        ("RESUME", w.command(Cmd.POSTCOPY_RESUME),
         f"POSTCOPY_RESUME: the source asks for {_RECOVERY}"),
        ("RECV_BITMAP", w.command(Cmd.RECV_BITMAP, b"\6pc.ram"),
         f"RECV_BITMAP: the source asks for {_RECOVERY}"),
        ("discard too short", discard(bytes(19)), "POSTCOPY_RAM_DISCARD of 19 bytes is too short"),
        ("discard of version 1", discard(b"\1\1a\0", PAIR),
         "POSTCOPY_RAM_DISCARD of 20 bytes has version 1, expected 0"),
        ("discard without a name", discard(b"\0\0\0\0", PAIR),
         "POSTCOPY_RAM_DISCARD of 20 bytes has no NUL behind the block's name"),
        ("discard without NUL", discard(b"\0\1a\1", PAIR),
         "POSTCOPY_RAM_DISCARD of 20 bytes has no NUL behind the block's name"),
        ("discard with a name that ends outside", discard(b"\0\xffa\0", PAIR),
         "POSTCOPY_RAM_DISCARD of 20 bytes has no NUL behind the block's name"),
        ("discard of no range", discard(b"\0\x11", b"a" * 17, b"\0"),
         "POSTCOPY_RAM_DISCARD of 20 bytes does not hold whole (start, length) pairs"),
        ("discard of half a range", discard(b"\0\1a\0", PAIR, PAIR[:8]),
         "POSTCOPY_RAM_DISCARD of 28 bytes does not hold whole (start, length) pairs"),
        ("package too long", w.command(Cmd.PACKAGED, struct.pack(">I", MAX_PACKAGE_BYTES + 1)),
         "package of 268435457 bytes, expected at most 268435456"),
        ("package without LISTEN", _package(RUN),
         "package of 5 bytes begins with 0800050000, expected POSTCOPY_LISTEN"),
        ("package without RUN", _package(LISTEN + DEVICE),
         f"package of {5 + len(DEVICE)} bytes ends with {DEVICE[-5:].hex()}, "
         "expected POSTCOPY_RUN"),
        ("empty package", _package(b""),
         "package of 0 bytes begins with , expected POSTCOPY_LISTEN"),
    ),
    *_behind(
        READY + END,
        ("PART after END", section(Section.PART, 2), "PART of section 'ram' after its END"),
        ("END after END", section(Section.END, 2), "END of section 'ram' after its END"),
    ),
    *_in_block_list(
        ("no block list", start("ram") + w.eos(), "RAM record 0x10 before the block list"),
        ("a page before the list", start("ram") + w.page("pc.ram", 0, DATA),
         "RAM record 0x8 before the block list"),
        ("no RAM", block_list(0), f"RAM of 0x0 bytes, expected 1..{MAX_RAM_BYTES:#x}"),
        ("huge RAM", block_list(MAX_RAM_BYTES + 4096),
         f"RAM of {MAX_RAM_BYTES + 4096:#x} bytes, expected 1..{MAX_RAM_BYTES:#x}"),
        ("empty block", block_list(8192, ("a", 0)),
         "block 'a' of 0x0 bytes is not a whole number of 4096-byte pages"),
        ("half a page", block_list(8192, ("a", 2048)),
         "block 'a' of 0x800 bytes is not a whole number of 4096-byte pages"),
        ("block twice", block_list(8192, ("a", 4096), ("a", 4096)),
         "block 'a' stands twice in the block list"),
        ("more than the total", block_list(8192, ("a", 4096), ("b", 8192)),
         "block 'b' of 0x2000 bytes exceeds the 0x1000 bytes that the block list has left"),
        ("block without a name", block_list(4096, ("", 4096)),
         "RAM block list entry with an empty name"),
        ("block name with a NUL", block_list(4096, ("a\0b", 4096)),
         "block name 'a\\x00b' with a NUL in it"),
        ("too many blocks",
         block_list(300 * 4096, *((f"b{n}", 4096) for n in range(MAX_BLOCKS + 1))),
         f"more than {MAX_BLOCKS} RAM blocks"),
    ),
    Bad("a second block list", READY + section(Section.PART, 2, struct.pack(">Q", 0x1004)),
        "a second block list", len(READY) + 5),
    Bad("a bad record", READY + section(Section.PART, 2, struct.pack(">Q", 0x1001)),
        "the source sends an obsolete 'full' record", len(READY) + 5),
)  # fmt: skip
