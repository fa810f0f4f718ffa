"""Packets of multifd: one table of cases, on the Python reference and on the C loop."""

from __future__ import annotations

import contextlib
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES, Placement
from sharded_pc.native.multifd import can_unpack
from sharded_pc.native.ram import Stop
from sharded_pc.wire import multifd as wire
from sharded_pc.wire.feed import Feed
from sharded_pc.wire.multifd import Flag
from tests.packet_cases import (
    BAD,
    BLOCKS,
    GOOD,
    READERS,
    WAIT_S,
    Core,
    data,
    packet,
    read,
    reference,
    sync,
)


def needs_zlib(name: str) -> None:
    if ("zlib" in name or "packed" in name) and not can_unpack(Flag.ZLIB):
        pytest.skip("built without zlib")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", GOOD)
def test_good_packets(name, reader):
    needs_zlib(name)
    wanted = reference(GOOD[name], 1 << 30)
    assert wanted.error is None
    assert read(reader, GOOD[name]) == wanted
    assert read(reader, GOOD[name], step=997) == wanted


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD)
def test_bad_packets(name, reader):
    needs_zlib(name)
    stream, error = BAD[name]
    before = packet(0, 7, 8)
    seen = read(reader, before + stream)
    assert seen.error == error
    assert seen.received["pc.ram"] == [7, 8]
    assert seen.memory == reference(before, 1 << 30).memory


@pytest.mark.parametrize("size", [1, 1343, 1344 + 5, 1344 + 4096])
def test_a_channel_that_ends_in_a_packet(size):
    seen = read(Placement.COPY, packet(0, 1, 2)[:size])
    assert seen.error == "multifd: the channel ended in the middle of a packet"


@given(st.binary(max_size=1500), st.integers(0, 1344))
@settings(max_examples=100, deadline=None)
def test_rubbish_is_refused_by_name(raw, keep):
    """Whatever comes: an event, a wish for more, or a RemoteProtocolError."""
    feed = Feed(wire.Reader({block.name: block for block in BLOCKS}).packets())
    with contextlib.suppress(RemoteProtocolError):
        feed.feed(packet(0, 1)[:keep] + raw)


@given(st.lists(st.tuples(st.sets(st.integers(0, 299), min_size=1, max_size=20), st.booleans()),
                max_size=8))  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_both_readers_agree(rounds):
    packets = [
        packet(number, zero=tuple(where)) if zeros else packet(number, *where, version=number)
        for number, (where, zeros) in enumerate(rounds)
    ]
    stream = b"".join(packets)
    assert read(Placement.CONTINUE, stream) == read(Placement.COPY, stream) == reference(stream, 99)


def test_opening():
    assert wire.parse_opening(wire.opening(7)) == 7
    with pytest.raises(RemoteProtocolError, match="magic 0x00000000"):
        wire.parse_opening(bytes(64))


class TestMeeting:
    @pytest.fixture
    def core(self):
        with contextlib.ExitStack() as stack:
            yield Core(Placement.COPY, stack)

    @pytest.fixture
    def stop(self):
        made = Stop()
        yield made
        made.close()

    def test_nothing_of_the_next_round_comes_before_it(self, core, stop):
        with core.channel(0) as one, core.channel(1) as two:
            one.sendall(packet(0, 1) + sync(1) + packet(3, 1, version=1) + sync(4))
            two.sendall(packet(2, 2))
            result: list = []
            waiting = threading.Thread(target=lambda: result.append(core.meeting.wait(2, 1, stop)))
            waiting.start()
            two.sendall(sync(5))
            waiting.join(WAIT_S)
            assert (result[0].packets, result[0].numbers) == (4, 6)
            assert core.memory()["pc.ram"][PAGE_BYTES : 2 * PAGE_BYTES] == data(1)
            core.meeting.release(1)
            two.sendall(sync(6))
            assert core.meeting.wait(2, 2, stop).packets == 7
            assert core.memory()["pc.ram"][PAGE_BYTES : 2 * PAGE_BYTES] == data(1, 1)
            core.meeting.release(2)

    def test_pages_after_the_switch_are_refused(self, core):
        assert core.meeting.settle(1) is None
        with core.channel(0) as sock:
            sock.sendall(sync(0) + sync(1) + packet(2, 3))
        assert "pages on a channel after the source's switch" in str(core.meeting.why_ended(0))
        assert core.pages()["pc.ram"] == []

    def test_pages_that_are_on_their_way_at_the_switch_are_noticed(self, core):
        with core.channel(0) as sock:
            sock.sendall(packet(0, *range(40))[: 1344 + 35 * PAGE_BYTES])
            deadline = threading.Event()
            while not core.received.test(31) and not deadline.wait(0.001):
                pass
            assert core.meeting.settle(1) == 0
