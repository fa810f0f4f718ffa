"""A synthetic source with channels of multifd: both ways of meeting, and what may go wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket

import pytest

from sharded_pc.wire import multifd as wire
from sharded_pc.wire import writer
from tests.multifd_source import ChannelSource, source_of
from tests.receiver import Receiver
from tests.synthetic import ORACLE

pytestmark = pytest.mark.uffd
TWO_WORKERS = (None, "--workers", "2")


def check_ram(receiver: Receiver) -> None:
    ram = receiver.ram()
    for block, about in enumerate(ORACLE.blocks):
        assert ORACLE.first_wrong(block, ram[about.name], ORACLE.final(block)) is None


@pytest.mark.parametrize("flushes", [True, False], ids=["flush", "each-section"])
@pytest.mark.parametrize("placement", ["copy", "continue"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_postcopy(tmp_path, unique_name, channels, placement, flushes):
    """As QEMU 10.1 and 7.2 do it: channels stay open until the end."""
    with (
        Receiver(tmp_path, unique_name, None, "--placement", placement) as receiver,
        source_of(receiver, flushes=flushes, numbers=range(channels)) as source,
    ):
        source.begin()
        if not flushes:  # 7.2 goes on with its SYNCs
            for _ in range(3):
                source._send(writer.ram_section(source.sync()))
        source.end()
        outcome = receiver.finish()
        assert outcome.exit_code == 0, receiver.stderr()
        check_ram(receiver)
        assert outcome.info["ram"]["transferred"] > 2 * outcome.info["ram"]["total"]


def failure(receiver: Receiver, *, exit_code: int = 4) -> str:
    outcome = receiver.finish()
    assert (outcome.exit_code, outcome.info["status"]) == (exit_code, "failed"), receiver.stderr()
    return outcome.info["error-desc"]


def fails(
    tmp_path, name, numbers=(0, 1), *, flushes=True, of=lambda source: source.precopy()
) -> str:
    """Why the migration ends at once: before the switch, the source's guest goes on."""
    with (
        Receiver(tmp_path, name, keep=False) as receiver,
        source_of(receiver, flushes=flushes, numbers=numbers) as source,
    ):
        with contextlib.suppress(ConnectionError):
            source.set_up()
            of(source)
        return failure(receiver)


def test_a_gap_in_the_numbers(tmp_path, unique_name):
    assert "channels 0, 2 are here" in fails(tmp_path, unique_name, (0, 2))


def test_a_number_twice(tmp_path, unique_name):
    assert "channels 0, 0 are here" in fails(tmp_path, unique_name, (0, 0))


@pytest.mark.parametrize("flushes", [True, False])
def test_a_channel_that_is_not_here(tmp_path, unique_name, flushes):
    """Its packets are missing from those that the source has numbered."""

    def skip(source: ChannelSource) -> None:
        source.number += 1  # the SYNC of a third
        source.precopy()

    assert "one of the source's channels is not here" in fails(
        tmp_path, unique_name, flushes=flushes, of=skip
    )


def test_a_channel_that_comes_late(tmp_path, unique_name):
    def late(source: ChannelSource) -> None:
        source.back._wait(lambda: 1 in source.back.pongs, "not reached")
        source.round(0, ORACLE.precopied(0))
        source.open_channel(2)

    assert "opened after the source had begun to send RAM" in fails(tmp_path, unique_name, of=late)


def test_no_channel_at_all(tmp_path, unique_name):
    nothing = lambda source: None  # noqa: E731
    assert "has opened none here" in fails(tmp_path, unique_name, (), of=nothing)


def test_a_channel_that_ends(tmp_path, unique_name):
    def end(source: ChannelSource) -> None:
        source.channels[1].shutdown(socket.SHUT_RDWR)
        source.channels.pop()
        source.precopy()

    assert "closed channel 1 of multifd before" in fails(tmp_path, unique_name, of=end)


def test_a_bad_packet_is_told_when_the_wire_ends(tmp_path, unique_name):
    def spoil(source: ChannelSource) -> None:
        source.channels[1].sendall(bytes(wire.PACKET_BYTES))
        assert source.channels[1].recv(1) == b""
        source._sock.shutdown(socket.SHUT_WR)

    assert "channel 1: multifd: magic 0x00000000" in fails(tmp_path, unique_name, of=spoil)


def test_a_worker_that_dies(tmp_path, unique_name):
    """What it had taken off its channel nobody has: the migration fails at once."""
    with (
        Receiver(
            tmp_path, unique_name, None, "--workers", "2", keep=False, control=True
        ) as receiver,
        source_of(receiver, flushes=True) as source,
    ):
        source.set_up()
        source.round(0, ORACLE.precopied(0))
        source.round(1, ORACLE.precopied(1))
        source.back._wait(lambda: 1 in source.back.pongs, "not reached")
        os.kill(receiver.status()["sharded"]["shards"][1]["pid"], signal.SIGKILL)
        assert "a worker died that was receiving channel 1" in failure(receiver, exit_code=1)


def test_a_worker_that_dies_after_the_switch(tmp_path, unique_name):
    with (
        Receiver(tmp_path, unique_name, *TWO_WORKERS, control=True) as receiver,
        source_of(receiver, flushes=True) as source,
    ):
        source.begin()
        source.wait_switched()
        os.kill(receiver.status()["sharded"]["shards"][1]["pid"], signal.SIGKILL)
        source.end()
        assert receiver.finish().exit_code == 0, receiver.stderr()
        check_ram(receiver)
