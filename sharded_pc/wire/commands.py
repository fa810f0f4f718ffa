"""Commands of the stream (QEMU migration/savevm.c): be16 number, be16 length, payload."""

from __future__ import annotations

import struct

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.wire import events
from sharded_pc.wire.constants import COMMAND_LENGTHS, Cmd
from sharded_pc.wire.steps import Parser, number, text

_LATER = {
    Cmd.ENABLE_COLO: "COLO replication (turn the source's x-colo capability off)",
}


def _discard(payload: bytes) -> events.RamDiscard:
    """u8 version 0, u8 name length, name, NUL, then (be64 start, be64 length) pairs."""
    bad = f"POSTCOPY_RAM_DISCARD of {len(payload)} bytes"
    if len(payload) < 20:
        raise RemoteProtocolError(f"{bad} is too short")
    version, size = payload[0], payload[1]
    if version != 0:
        raise RemoteProtocolError(f"{bad} has version {version}, expected 0")
    name, rest = payload[2 : 2 + size], payload[2 + size :]
    if size == 0 or not rest or rest[0] != 0:
        raise RemoteProtocolError(f"{bad} has no NUL behind the block's name")
    pairs = rest[1:]
    if not pairs or len(pairs) % 16:
        raise RemoteProtocolError(f"{bad} does not hold whole (start, length) pairs")
    return events.RamDiscard(text(name), tuple(struct.iter_unpack(">QQ", pairs)))


def _advise(payload: bytes) -> events.PostcopyAdvise:
    if not payload:
        return events.PostcopyAdvise(None, None)
    return events.PostcopyAdvise(*struct.unpack(">QQ", payload))


def _recv_bitmap(payload: bytes) -> events.RecvBitmap:
    """u8 name length, name."""
    if len(payload) < 2 or len(payload) != 1 + payload[0]:
        raise RemoteProtocolError(f"RECV_BITMAP of {len(payload)} bytes does not hold one name")
    return events.RecvBitmap(text(payload[1:]))


def meaning(cmd: Cmd, payload: bytes):
    """The event of a command whose length is right; RemoteProtocolError."""
    match cmd:
        case Cmd.OPEN_RETURN_PATH:
            return events.OpenReturnPath()
        case Cmd.PING:
            return events.Ping(int.from_bytes(payload, "big"))
        case Cmd.POSTCOPY_ADVISE:
            return _advise(payload)
        case Cmd.POSTCOPY_LISTEN:
            return events.PostcopyListen()
        case Cmd.POSTCOPY_RUN:
            return events.PostcopyRun()
        case Cmd.POSTCOPY_RAM_DISCARD:
            return _discard(payload)
        case Cmd.PACKAGED:
            return events.Packaged(int.from_bytes(payload, "big"))
        case Cmd.SWITCHOVER_START:
            return events.SwitchoverStart()
        case Cmd.RECV_BITMAP:
            return _recv_bitmap(payload)
        case Cmd.POSTCOPY_RESUME:
            return events.PostcopyResume()
        case _:
            raise RemoteProtocolError(f"{cmd.name}: the source asks for {_LATER[cmd]}")


def command() -> Parser:
    """The event of one command, whose section byte was taken already."""
    cmd = yield from number(2)
    size = yield from number(2)
    which = known(cmd, size)
    payload = (yield size) if size else b""
    return meaning(which, bytes(payload))


def known(cmd: int, size: int) -> Cmd:
    """The command of that number, if it may have `size` bytes; RemoteProtocolError."""
    if cmd not in list(Cmd):
        raise RemoteProtocolError(f"unknown command {cmd:#x} of {size} bytes")
    cmd = Cmd(cmd)
    lengths = COMMAND_LENGTHS.get(cmd)
    if lengths is not None and size not in lengths:
        expected = " or ".join(map(str, lengths))
        raise RemoteProtocolError(f"{cmd.name} of {size} bytes, expected {expected}")
    return cmd
