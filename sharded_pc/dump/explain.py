"""What an event says, in QMP's spelling."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable, Iterable

from sharded_pc.dump import multifd, reader
from sharded_pc.dump.records import KINDS, Counted, ListedBlock
from sharded_pc.native.records import Passed
from sharded_pc.wire import events as e
from sharded_pc.wire.constants import FILE_VERSION, Cmd


def event(told: object) -> dict:
    """The keys that an event adds to its message."""
    return _EVENTS.get(type(told), lambda _: {})(told)


def counted(found: Counted) -> dict:
    """RAM records of a section."""
    out: dict = {}
    ram = [
        {"block": name} | {kind: pages_of(kinds[kind]) for kind in KINDS if kinds[kind]}
        for name, kinds in found.blocks.items()
        if any(kinds.values())
    ]
    if ram:
        out["ram"] = ram
    if found.flushes:
        out["multifd-flush"] = found.flushes
    if found.hooks:
        out["rdma-hook"] = found.hooks
    return out


def pages_of(passed: Passed) -> dict:
    raw = passed.raw
    return {"pages": raw.pages, "runs": raw.runs, "first": raw.first, "last": raw.last}


def blocks(listed: Iterable[ListedBlock]) -> list[dict]:
    return [_block(block) for block in listed]


def _block(block: ListedBlock) -> dict:
    out: dict = {"name": block.name, "size": block.size}
    if block.page_size is not None:
        out["page-size"] = block.page_size
    if block.address is not None:
        out["address"] = block.address
    if block.mapped is not None:
        names = ("version", "page-size", "bitmap-offset", "pages-offset")
        out["mapped-ram"] = dict(zip(names, block.mapped, strict=True))
    return out


def _command(name: str, told: object) -> dict:
    return {"type": "command", "command": name}


def _ping(told: e.Ping) -> dict:
    return {"type": "command", "command": "ping", "value": told.value}


def _advise(told: e.PostcopyAdvise) -> dict:
    out = {"type": "command", "command": "postcopy-advise"}
    if told.page_sizes is None:
        return out | {"dirty-bitmaps-only": True}
    return out | {"page-sizes": told.page_sizes, "target-page-size": told.target_page_size}


def _discard(told: e.RamDiscard) -> dict:
    ranges = [{"start": start, "length": length} for start, length in told.ranges]
    return {
        "type": "command",
        "command": "postcopy-ram-discard",
        "block": told.block,
        "ranges": ranges,
    }


def _other(told: reader.OtherCommand) -> dict:
    known = told.number in list(Cmd)
    name = _spelt(Cmd(told.number).name) if known else "unknown"
    out = {"type": "command", "command": name, "length": len(told.payload)}
    return out if known else out | {"number": told.number}


def _spelt(name: str) -> str:
    return name.lower().replace("_", "-")


def _subsection(told: e.Subsection) -> dict:
    out: dict = {"type": "subsection", "name": told.name, "version-id": told.version}
    if told.target_page_bits is not None:
        out["target-page-bits"] = told.target_page_bits
    if told.uuid is not None:
        out["uuid"] = str(uuid.UUID(bytes=told.uuid))
    if told.name.endswith("/capabilities"):
        out["capabilities"] = list(told.capabilities)
    return out


def _section(told: reader.SectionOf) -> dict:
    out = {"type": "section", "kind": _spelt(told.kind.name), "section-id": told.section}
    return out if told.name is None else out | {"name": told.name}


def _head(told: e.SectionHead) -> dict:
    return {"name": told.name, "instance-id": told.instance, "version-id": told.version}


def _opaque(told: reader.Opaque) -> dict:
    out: dict = {"opaque": told.size}
    return out if told.footer else {"type": "opaque"} | out


def _description(told: e.VmDescription) -> dict:
    out: dict = {"type": "vmdescription", "length": len(told.json)}
    found = json.loads(told.json.rstrip(b"\0"))
    devices = found.get("devices") if isinstance(found, dict) else None
    if isinstance(devices, list):
        out["devices"] = [_device(each) for each in devices if isinstance(each, dict)]
    return out


def _device(told: dict) -> dict:
    keys = ("name", "instance_id", "vmsd_name", "version")
    return {_spelt(key): told[key] for key in keys if key in told}


def _greeting(told: multifd.Greeting) -> dict:
    of = str(uuid.UUID(bytes=told.uuid))
    return {"type": "multifd", "uuid": of, "channel": told.channel}


def _flags(value: int) -> list[str]:
    names = [name for bit, name in multifd.FLAGS.items() if value & bit]
    unknown = value & ~sum(multifd.FLAGS)
    return names + ([f"{unknown:#x}"] if unknown else [])


def _packet(told: multifd.Packet) -> dict:
    out: dict = {"type": "packet", "number": told.number, "flags": _flags(told.flags)}
    out["length"] = told.size
    pages = {"normal": told.normal, "duplicate": told.zero}
    found = {kind: pages_of(_passed(offsets)) for kind, offsets in pages.items() if offsets}
    return out | ({"ram": [{"block": told.block} | found]} if found else {})


def _passed(offsets: Iterable[int]) -> Passed:
    passed = Passed()
    for offset in offsets:
        passed.add(offset)
    return passed


def _device_state(told: multifd.DeviceState) -> dict:
    out = {"type": "packet", "flags": _flags(told.flags), "name": told.name}
    return out | {"instance-id": told.instance, "opaque": told.size}


_EVENTS: dict[type, Callable] = {
    reader.Header: lambda _: {"type": "header", "magic": "QEVM", "version": FILE_VERSION},
    e.Configuration: lambda told: {"type": "configuration", "machine": told.machine},
    e.Subsection: _subsection,
    reader.SectionOf: _section,
    e.SectionHead: _head,
    reader.Opaque: _opaque,
    e.OpenReturnPath: functools.partial(_command, "open-return-path"),
    e.PostcopyListen: functools.partial(_command, "postcopy-listen"),
    e.PostcopyRun: functools.partial(_command, "postcopy-run"),
    e.PostcopyResume: functools.partial(_command, "postcopy-resume"),
    e.SwitchoverStart: functools.partial(_command, "switchover-start"),
    e.Ping: _ping,
    e.PostcopyAdvise: _advise,
    e.RamDiscard: _discard,
    e.RecvBitmap: lambda told: {**_command("recv-bitmap", told), "block": told.block},
    e.Packaged: lambda told: {**_command("packaged", told), "length": told.length},
    reader.OtherCommand: _other,
    e.Eof: lambda _: {"type": "eof"},
    e.VmDescription: _description,
    multifd.Greeting: _greeting,
    multifd.Packet: _packet,
    multifd.DeviceState: _device_state,
}
