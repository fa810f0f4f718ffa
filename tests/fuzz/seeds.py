"""What every corpus begins with: the cases of each parser's tests, so that a new case is fuzzed as
well.  What fuzzing has found on top of it stands in `corpus/`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable

from sharded_pc.attach import protocol
from sharded_pc.wire import multifd, writer
from sharded_pc.wire import return_path as rp
from tests import bad_stream_cases, packet_cases, stream_cases, wire_cases
from tests.fuzz.targets import attaching, incoming

SCM_MAX_FD = 253
"""Of attach/guest/message.h too: one descriptor comes with each block."""


def _stream() -> Iterable[bytes]:
    yield from (case.stream for case in (*stream_cases.GOOD, *stream_cases.UNDESCRIBED))
    yield from (case.stream for case in bad_stream_cases.BAD if len(case.stream) < 1000)


def _dump() -> Iterable[bytes]:
    """Recordings of all kinds."""
    yield from _stream()
    yield writer.recv_bitmap("pc.ram") + writer.postcopy_resume() + writer.ram_section(b"")
    page = writer.page("pc.ram", 4096, stream_cases.DATA)
    yield page + writer.zero_page(None, 8192)
    greeting = struct.pack(">II16sB39x", 0x11223344, 1, bytes(16), 1)
    packet = multifd.header(7, 0, "a", (0,), (4096,))
    yield greeting + packet + stream_cases.DATA
    yield greeting + struct.pack(">III256sII", 0x11223344, 1, 64, b"vfio", 3, 5) + b"state"


def _incoming() -> Iterable[bytes]:
    """Streams that are taken to their end: what is wrong is for the mutations."""
    yield from (case.stream for case in stream_cases.GOOD[:3])
    head = stream_cases.READY + writer.open_return_path() + writer.postcopy_advise()
    rest = b"".join(writer.zero_page(None, page << 12) for page in range(1, 16))
    all_pages = writer.page("pc.ram", 0, stream_cases.DATA) + rest + writer.zero_page("pc.bios", 0)
    discard = writer.discard("pc.ram", [(0, 0x10000)]) + writer.discard("pc.bios", [(0, 4096)])
    switch = discard * 2 + writer.packaged(stream_cases.DEVICE, (3, 0x42))
    pages = writer.ram_section(all_pages)
    yield head + pages + switch + pages + writer.ram_section(b"", last=True) + writer.eof()
    rest = writer.ram_section(all_pages, last=True) + writer.eof()
    yield head + switch + writer.ping(4) + rest
    bitmaps = writer.recv_bitmap("pc.ram") + writer.recv_bitmap("pc.bios")
    recovery = bitmaps + writer.postcopy_resume()
    cut = pages[: len(pages) // 2]
    yield head + switch + cut + incoming.LOST + recovery + cut + incoming.LOST + recovery + rest


def _return_path() -> Iterable[bytes]:
    yield rp.req_pages(0x3000, 0x1000, "pc.ram") + rp.req_pages(0x5000, 0x2000) + rp.shut()
    yield rp.pong(1) + rp.req_pages(5 << 30, 4096, "n" * 255)
    yield rp.recv_bitmap("pc.ram", bytes(16)) + rp.recv_bitmap("a", b"") + rp.resume_ack()


def _addresses() -> Iterable[bytes]:
    yield from (b"tcp:0.0.0.0:4444", b"tcp:[::1]:1", b"unix:/tmp/m", b"fd:3", b"exec:cat f")
    yield from (b"file:/tmp/recording", b"file:/tmp/recording,offset=0x1000")
    yield b"tcp:a:1,keep-alive=on,keep-alive-idle=9,keep-alive-interval=2,keep-alive-count=3"


def _attaching() -> Iterable[bytes]:
    said = (
        protocol.attach(),
        protocol.geometry("guest", attaching.RAM, "missing+minor"),
        protocol.geometry("guest", attaching.RAM, None),
        protocol.mappings({"pc.ram": 1 << 32, "pc.bios": 1 << 33}),
        {"attached": {"guest": 0}},
        protocol.event(protocol.READY),
        protocol.event(protocol.FAILED, 'the "source" is gone'),
        protocol.completed(huge_pages=True),
        protocol.error("no room"),
    )
    return [json.dumps(each).encode() for each in said]


def _message() -> Iterable[bytes]:
    yield from _attaching()
    head = b'{"geometry":{"version":1,"shards":1,"stripe-size":4096,"mode":null,"blocks":['
    for blocks in (1, SCM_MAX_FD, SCM_MAX_FD + 1):
        yield head + b",".join([b'{"name":"a","size":9,"first-stripe":0}'] * blocks) + b"]}}"
    yield b'{"event":"\\u00e9\\'


def _json_values() -> Iterable[bytes]:
    yield b"".join(_control_socket())
    yield b'[{"a": [1, -2.5e3, true, false, null]}, "\\u00e9\\\\\\""]\xc3\xa9'
    yield '{"é": "\U0001f600"} {"é": "\U0001f600"}'.encode()
    yield b"[" * 900 + b"]" * 900


def _control_socket() -> Iterable[bytes]:
    yield b'{"execute": "qmp_capabilities", "id": [{"a": 1.5}]}\n{"execute": "query-migrate"}'
    yield b'{"execute": "qmp_capabilities"}{"execute": "query-commands"}{"execute": "quit"}'
    yield (
        b'{"execute": "qmp_capabilities"}'
        b'{"execute": "migrate-recover", "arguments": {"uri": "unix:/tmp/a"}, "id": null}'
    )
    yield b'{"execute": "qmp_capabilities", "id": ' + b"[" * 900 + b"]" * 900 + b"}"


def _command_line() -> Iterable[bytes]:
    qemu = "qemu-system-x86_64 "
    lines = (
        "-m 256 -nodefaults -device virtio-net-pci -netdev user,id=n0",
        "-m size=256M,slots=2,maxmem=1G -M q35,accel=tcg -smp 2 -global migration.x-colo=off",
        "-object memory-backend-ram,id=ram0,size=64M -object memory-backend-file,id=ram1,size=64M,"
        "mem-path=/x,,y,share=on,policy=bind,host-nodes=0,host-nodes=2 "
        "-numa node,memdev=ram0 -numa node,memdev=ram1",
        '-object {"qom-type":"memory-backend-ram","id":"ram0","size":67108864,"host-nodes":[0]} '
        '-machine {"type":"pc","memory-backend":"ram0"}',
        "-m 256 -object memory-backend-ram,id=ram0,size=64M -device pc-dimm,memdev=ram0 "
        "-overcommit mem-lock=off -run-with async-teardown=on",
        '-blockdev {"driver":"qcow2","file":{"driver":"file","filename":"f"}} -drive file=f,if=ide',
    )
    return [(qemu + line).replace(" ", "\n").encode() for line in lines]


def _info_ramblock() -> Iterable[bytes]:
    lines = (
        "Block Name    PSize  Offset              Used               Total",
        "    pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000",
        " 0000:00:02.0/odd name.rom  4 KiB  0x0000000004280000 0x0000000000010000"
        " 0x0000000000020000 0x00007f3000000000  ro",
    )
    yield "".join(line + "\n" for line in lines).encode()


def _discards() -> Iterable[bytes]:
    one = writer.discard("pc.ram", [(0, 0x1000), (0x40000, 0x45000)])
    for placement in (b"\0", b"\1"):
        yield placement + one + writer.discard("pc.bios", [(0, 0x3000)])
        yield placement + writer.discard("pc.ram", [(page << 12, 4096) for page in range(12)])
        yield placement + writer.discard("pc.ram", [(0xC7000, 0x2000)])
        yield placement + one + writer.postcopy_advise()
        yield placement + one[:-1]


def _word(kind: int, argument: int = 0) -> bytes:
    return bytes([kind | argument << 3])


def _ram() -> Iterable[bytes]:
    """Programs of native/stream/ram.c."""
    raw, named, pages, zeros, payload, deliver, eos, other = range(8)
    run = _word(named) + b"\5" + _word(pages, 31) + _word(deliver, 9) + _word(pages, 20)
    mixed = _word(named, 1) + b"\0" + _word(zeros, 2) + _word(named) + b"\x3e" + _word(zeros, 8)
    record = struct.pack(">QB", 0x2008, 6) + b"pc.ram"
    refused = _word(raw, len(record) - 1) + record + _word(payload, 31) + _word(raw, 7) + bytes(8)
    later = _word(other) + run + mixed + _word(eos) + run
    delta = _word(other, 2) + b"\x0a\0\2ab\x90\x03\3abc"
    for world in range(8):
        yield bytes([world]) + run + mixed + _word(eos, 3) + run + _word(deliver)
        yield bytes([world]) + run + delta + _word(deliver, 3) + delta + mixed + delta
        yield bytes([world]) + run + _word(other, 1) + b"\4\7\0" + later
        yield bytes([world]) + mixed + _word(other, 30) + b"\x10" + later + refused


def _packets() -> Iterable[bytes]:
    """Programs of native/packets.c."""
    raw, plain, sync, payload, spoil, method, packed, _ = range(8)
    good = _word(plain, 3) + b"\x20" + _word(payload, 2) + _word(plain, 8) + b"\x21"
    good += _word(sync, 9) + b"\0" + _word(plain, 1) + b"\0" + _word(payload)
    unpacked = b"".join(_word(packed, n) + bytes([60 + n]) for n in range(8))
    for placement in (b"\0", b"\1"):
        yield placement + good * 3
        yield placement + unpacked + _word(sync) + b"\0" + unpacked
        yield placement + unpacked + _word(packed, 17) + b"\x10" + unpacked
        for which in (0, 1):
            yield (
                placement
                + _word(method, which)
                + b"\x10\x08"
                + _word(raw, 8)
                + b"(\xb5/\xfd\4\0abc"
            )
        for at in range(7):
            yield placement + good + _word(plain, 5) + b"\3" + _word(spoil, at) + b"\xff" + good
        yield placement + _word(plain, 2) + b"\xc7" + _word(payload, 1)
        yield placement + good + _word(raw, 31) + bytes(32)


def _channel_packets() -> Iterable[bytes]:
    return [*packet_cases.GOOD.values(), *(stream for stream, _ in packet_cases.BAD.values())]


def _ram_records() -> Iterable[bytes]:
    cases = (*wire_cases.GOOD, *wire_cases.BAD)
    return [case.stream for case in cases if len(case.stream) < 20_000]


_SEEDS: dict[str, Callable[[], Iterable[bytes]]] = {
    "addresses": _addresses,
    "attaching": _attaching,
    "command_line": _command_line,
    "control_socket": _control_socket,
    "discards": _discards,
    "incoming": _incoming,
    "info_ramblock": _info_ramblock,
    "json_values": _json_values,
    "message": _message,
    "channel_packets": _channel_packets,
    "packets": _packets,
    "preempt_records": _ram_records,
    "ram": _ram,
    "ram_records": _ram_records,
    "return_path": _return_path,
    "dump": _dump,
    "stream": _stream,
}


def of(target: str) -> list[bytes]:
    return list(_SEEDS[target]())
