"""Whole streams through the sans-I/O reader, the writer's round trips, and the return path."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_pc.errors import RemoteProtocolError, StreamEnded
from sharded_pc.wire import events as e
from sharded_pc.wire import return_path as rp
from sharded_pc.wire import writer
from sharded_pc.wire.constants import Cmd
from sharded_pc.wire.feed import Feed, read_stream
from sharded_pc.wire.machine import awaits_switchover_ack
from sharded_pc.wire.reader import StreamReader
from tests import stream_cases as cases
from tests.bad_stream_cases import BAD, Bad
from tests.stream_cases import Good

OPENING = (
    e.Configuration(cases.MACHINE),
    e.RamSection("setup"),
    e.RamBlocks(cases.BLOCKS),
    e.RamSectionEnd("setup"),
)


def play(pieces, *, eof: bool = False) -> tuple[list, Feed]:
    """(events, the reader) of a stream that comes in pieces."""
    feed = read_stream()
    out = [event for piece in pieces for event in feed.feed(piece)]
    return out + (feed.eof() if eof else []), feed


def refusal(pieces) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        play(pieces)
    return caught.value


def cuts(stream: bytes):
    """Whole, split in two, byte by byte."""
    yield [stream]
    yield from ([stream[:at], stream[at:]] for at in places(stream))
    yield [stream[at : at + 1] for at in range(len(stream))]


def places(stream: bytes) -> list[int]:
    """Every offset; inside a page's bytes and in the middle of a very long stream a sample."""
    out, plain = [], cases.DATA not in stream
    for at in range(1, len(stream)):
        in_page = stream[at - 8 : at + 8] in cases.DATA
        in_the_middle = plain and 400 < at < len(stream) - 100
        if at % 61 == 0 or not (in_page or in_the_middle):
            out.append(at)
    return out


def named(table) -> list:
    return [pytest.param(case, id=case.name) for case in table]


@pytest.mark.parametrize("case", named(cases.GOOD))
def test_good_stream(case: Good) -> None:
    for pieces in cuts(case.stream):
        out, feed = play(pieces)
        assert tuple(out) == OPENING + case.events, [len(piece) for piece in pieces[:3]]
        assert feed.done


@pytest.mark.parametrize("case", named(cases.UNDESCRIBED))
def test_device_state_without_a_description(case: Good) -> None:
    """It ends with the wire, and says so only then."""
    for pieces in cuts(case.stream):
        out, feed = play(pieces)
        assert tuple(out) == OPENING + case.events[:3] and not feed.done
        assert tuple(out + feed.eof()) == OPENING + case.events and feed.done


@pytest.mark.parametrize("case", named(BAD))
def test_bad_stream(case: Bad) -> None:
    for pieces in cuts(case.stream):
        error = refusal(pieces)
        assert (error.what, error.offset) == (case.error, case.at), [len(p) for p in pieces[:3]]
    assert str(error) == f"{case.error} at stream offset {case.at}"


@pytest.mark.parametrize("case", named((*cases.GOOD, *cases.UNDESCRIBED)))
def test_truncated(case: Good) -> None:
    """A stream that is cut has not arrived, and the events so far are those of the whole."""
    whole = OPENING + case.events
    ends = _plausible_ends(case)
    for at in {0, *places(case.stream)} - ends:
        feed = read_stream()
        out = tuple(feed.feed(case.stream[:at]))
        assert out == whole[: len(out)]
        with pytest.raises(StreamEnded) as caught:
            feed.eof()
        assert caught.value.offset == at


def _plausible_ends(case: Good) -> set[int]:
    """Where device state ends, EOF included: a stream without a description may end there."""
    if e.Eof() in case.events and isinstance(case.events[-1], e.VmDescription):
        return {len(case.stream) - 5 - len(cases.RAW_DESCRIPTION)}
    return set()


def test_end_between_device_and_description() -> None:
    """The one cut that cannot be told from an end: what came is whole."""
    case = cases.GOOD[2]
    (at,) = _plausible_ends(case)
    out, feed = play([case.stream[:at]], eof=True)
    assert tuple(out) == OPENING + case.events[:-1] and feed.done


def test_blocks_are_told_before_their_pages() -> None:
    told = []
    feed = read_stream(told.append)
    feed.feed(cases.READY)
    assert told == [cases.BLOCKS]


@pytest.mark.parametrize("size", [8192, 4096])
def test_discard_of_a_long_name(size: int) -> None:
    name = "n" * 255
    out, _ = play([cases.READY + writer.discard(name, [(4096, size)] * 12)])
    assert out[-1] == e.RamDiscard(name, ((4096, size),) * 12)


def test_advise_of_dirty_bitmaps_only() -> None:
    out, _ = play([cases.HEAD + writer.command(3)])
    assert out[-1] == e.PostcopyAdvise(None, None)


def test_device_state_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharded_pc.wire.constants.MAX_DEVICES_BYTES", 1 << 20)
    error = refusal([cases.READY + cases.END + b"\x04", *[bytes(1 << 16)] * 17])
    assert error.what == "more than 1048576 bytes of device state after RAM"


@pytest.mark.parametrize("pings", [(), (3,), (3, 0x42), (1, 2, 3, 4)])
def test_pings_in_a_package(pings: tuple[int, ...]) -> None:
    out, _ = play([cases.READY + writer.packaged(cases.DEVICE, pings)])
    inside = out[len(OPENING) + 1 :]
    want = [e.PostcopyListen(), e.PackagedDevices(cases.DEVICE), *map(e.Ping, pings)]
    assert inside == [*want, e.PostcopyRun()]


@settings(deadline=None)  # a loaded machine is no error
@given(st.binary(max_size=400))
def test_any_bytes_are_events_or_an_error(garbage: bytes) -> None:
    for ready in (cases.HEAD, cases.READY, cases.READY + b"\x02\0\0\0\2", cases.READY + cases.END):
        feed = read_stream()
        with contextlib.suppress(RemoteProtocolError):
            feed.feed(ready + garbage)
            feed.eof()


# The return path

MESSAGES = (
    (rp.pong(1), rp.Pong(1)),
    (rp.req_pages(0x3000, 0x1000, "pc.ram"), rp.ReqPages("pc.ram", 0x3000, 0x1000)),
    (rp.req_pages(0x5000, 0x2000), rp.ReqPages("pc.ram", 0x5000, 0x2000)),
    (rp.req_pages(1 << 40, 4096, "n" * 255), rp.ReqPages("n" * 255, 1 << 40, 4096)),
    (rp.req_pages(0, 4096, "\udcff"), rp.ReqPages("\udcff", 0, 4096)),
    (rp.req_pages(0, 4096), rp.ReqPages("\udcff", 0, 4096)),
    (rp.pong(0xFFFFFFFF), rp.Pong(0xFFFFFFFF)),
    (rp.shut(), rp.Shut(0)),
    (rp.shut(1), rp.Shut(1)),
)


def test_return_path_round_trip() -> None:
    stream = b"".join(raw for raw, _ in MESSAGES)
    want = [message for _, message in MESSAGES]
    for pieces in cuts(stream):
        feed = Feed(rp.messages())
        assert [message for piece in pieces for message in feed.feed(piece)] == want


def test_return_path_bytes() -> None:
    """As QEMU writes them (facts-qemu.md 1.3)."""
    assert rp.shut() == bytes.fromhex("0001 0004 00000000")
    assert rp.pong(3) == bytes.fromhex("0002 0004 00000003")
    assert rp.req_pages(0x2000, 0x1000) == bytes.fromhex("0004 000c 0000000000002000 00001000")
    named = bytes.fromhex("0003 000f 0000000000002000 00001000 02") + b"ab"
    assert rp.req_pages(0x2000, 0x1000, "ab") == named


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (struct.pack(">HH", 9, 0), "return path message of unknown type 9"),
        (struct.pack(">HH", 2, 513), "return path message 2 of 513 bytes"),
        (struct.pack(">HHH", 1, 2, 0), "SHUT of 2 bytes"),
        (struct.pack(">HH", 2, 0), "PONG of 0 bytes"),
        (struct.pack(">HHQ", 4, 8, 0), "REQ_PAGES of 8 bytes"),
        (struct.pack(">HHQI", 4, 12, 0, 4096), "REQ_PAGES before any REQ_PAGES_ID"),
        (struct.pack(">HHQI", 3, 12, 0, 4096), "REQ_PAGES_ID of 12 bytes"),
        (struct.pack(">HHQIBB", 3, 14, 0, 4096, 2, 97),
         "REQ_PAGES_ID of 14 bytes with a name of 2"),
        (struct.pack(">HHB", 5, 1, 0), "RECV_BITMAP of 1 bytes"),
        (struct.pack(">HHBB", 5, 2, 2, 97), "RECV_BITMAP of 2 bytes with a name of 2"),
        (rp.message(rp.Rp.RECV_BITMAP, b"\1a") + struct.pack(">Q", 12),
         "received bitmap of 12 bytes"),
        (rp.message(rp.Rp.RECV_BITMAP, b"\1a") + struct.pack(">Q", 1 << 60),
         f"received bitmap of {1 << 60} bytes"),
        (rp.recv_bitmap("a", bytes(8))[:-8] + bytes(8),
         "received bitmap ends with 0x0000000000000000"),
    ],
)  # fmt: skip
def test_bad_return_path(raw: bytes, error: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        Feed(rp.messages()).feed(raw)
    assert caught.value.what == error


# --- recovery ---

BITMAP = struct.pack("<QQ", 0x8000_0000_0000_0005, 1)
"""Pages 0, 2, 63 and 64."""


def test_a_received_bitmap_as_qemu_writes_it() -> None:
    """Message, be64 size, little-endian words, be64 end mark (facts-qemu.md 2.2)."""
    want = (
        bytes.fromhex("0005 0003 02")
        + b"ab"
        + bytes.fromhex("0000000000000010 0500000000000080 0100000000000000 0123456789abcdef")
    )
    assert rp.recv_bitmap("ab", BITMAP) == want
    assert rp.resume_ack() == bytes.fromhex("0006 0004 00000001")
    assert rp.switchover_ack() == bytes.fromhex("0007 0000")


def test_the_source_reads_bitmaps_in_any_pieces() -> None:
    raw = rp.pong(1) + rp.recv_bitmap("ab", BITMAP) + rp.resume_ack() + rp.switchover_ack()
    for pieces in cuts(raw):
        feed = Feed(rp.messages())
        got = [message for piece in pieces for message in feed.feed(piece)]
        assert got == [
            rp.Pong(1), rp.RecvBitmap("ab", BITMAP), rp.ResumeAck(1), rp.SwitchoverAck()
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "awaits"),
    {
        "pc-i440fx-8.1": True,
        "pc-q35-10.0": True,
        "pc-q35-11.0": True,
        "pc-q35-11.1": False,
        "pc-i440fx-12.0": False,
        "virt-9.2": True,
        "microvm": True,
        "pc-q35-rhel9.6.0": True,
    }.items(),
)
def test_whose_switch_is_acknowledged(machine, awaits) -> None:
    """From machine types 11.1 on devices acknowledge for themselves (facts of 2026-11, A5)."""
    assert awaits_switchover_ack(machine) is awaits


def resumed(raw: bytes, ram_id: int = writer.RAM_SECTION) -> list:
    """The events of a recovery's stream whose RAM sections are empty."""

    def records():
        assert (yield 8) == writer.eos()

    return Feed(StreamReader(records).resumed_events(ram_id)).feed(raw)


def test_a_recovery_begins_without_a_header() -> None:
    raw = writer.recv_bitmap("pc.ram") + writer.recv_bitmap("vga") + writer.postcopy_resume()
    assert raw.startswith(bytes.fromhex("08 000a 0007 06") + b"pc.ram")
    raw += writer.ram_section(b"") + writer.ram_section(b"", last=True) + writer.eof()
    assert resumed(raw) == [
        e.RecvBitmap("pc.ram"), e.RecvBitmap("vga"), e.PostcopyResume(),
        e.RamSection("part"), e.RamSectionEnd("part"),
        e.RamSection("end"), e.RamSectionEnd("end"), e.Eof(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "error", "offset"),
    [
        (writer.header(), "section type 0x51 where a recovery begins", 0),
        (writer.ping(1), "Ping where a recovery begins", 0),
        (writer.recv_bitmap("a") + writer.ram_section(b""),
         "section type 0x02 where a recovery begins", 7),
        (writer.command(Cmd.POSTCOPY_RUN), "PostcopyRun where a recovery begins", 0),
        (writer.postcopy_resume() + writer.recv_bitmap("a"), "RECV_BITMAP: the source asks", 5),
        (writer.command(Cmd.RECV_BITMAP, b""), "RECV_BITMAP of 0 bytes does not hold", None),
        (writer.command(Cmd.RECV_BITMAP, b"\2a"), "RECV_BITMAP of 2 bytes does not hold", None),
        (writer.command(Cmd.RECV_BITMAP, b"\1ab"), "RECV_BITMAP of 3 bytes does not hold", None),
    ],
)  # fmt: skip
def test_bad_recoveries(raw: bytes, error: str, offset: int | None) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        resumed(raw)
    assert caught.value.what.startswith(error)
    assert offset is None or caught.value.offset == offset


# --- device state that is made to be searched ---


@pytest.mark.parametrize("size", [1 << 24, 5000])
def test_device_state_full_of_beginnings_is_refused(size: int) -> None:
    """Each byte is looked at once, and beginnings are counted, not kept."""
    stream = (
        cases.READY + cases.END + b"\x04" + (b"\x00\x06" + size.to_bytes(4, "big") + b"{") * 5000
    )
    with pytest.raises(RemoteProtocolError, match="more than 64 beginnings of a VMDESCRIPTION"):
        play([stream])


def test_a_description_behind_a_lot_of_device_state_is_found_in_time() -> None:
    """A beginning that never ends does not make what follows be read again and again."""
    trap = b"\x00\x06" + (1 << 24).to_bytes(4, "big") + b"{"
    filler = b"\x00\x06" + (3).to_bytes(4, "big") + b"["
    stream = cases.READY + cases.END + b"\x04" + trap + filler * 600_000
    pieces = [stream[at : at + 4096] for at in range(0, len(stream), 4096)]
    _, feed = play([*pieces, b"\x00" + writer.vmdescription({"page_size": 4096})])
    assert feed.done
