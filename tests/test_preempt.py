"""postcopy-preempt: pages that are asked for come on a channel of their own."""

from __future__ import annotations

import contextlib
import socket
from array import array
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from sharded_pc import preempt
from sharded_pc.address import UnixAddress
from sharded_pc.errors import ConnectionLost, RemoteProtocolError
from sharded_pc.state import PostcopyState
from sharded_pc.testing.oracle import DIRTIED
from sharded_pc.wire import writer
from tests.control import Control
from tests.guest_process import GuestProcess
from tests.preempt_source import EOS, PreemptSource, preempting
from tests.qemu import wait_until
from tests.synthetic import ORACLE, WAIT_S, Background, Receiving, connect, missing_pages

pytestmark = [pytest.mark.uffd, pytest.mark.usefixtures("placement")]

MISSING = missing_pages(ORACLE, 0)
DATA = missing_pages(ORACLE, 0, DIRTIED)
ZEROS = missing_pages(ORACLE, 0, 0)
OTHER = missing_pages(ORACLE, 1)
SECTION_HEAD = 5
"""Bytes of a section in front of its records."""


@contextlib.contextmanager
def migrating(
    folder: Path, name: str, *, early: bool = False, twice: bool = False, **settings
) -> Iterator[tuple]:
    """A receiver whose guest runs on nothing but precopied pages, its source with both channels
    (`early`: as 7.2 opens them), a control client."""
    path, uri = str(folder / f"{name}.control"), f"{folder}/{name}.mig"
    with contextlib.ExitStack() as stack:
        given = {"incoming": UnixAddress(uri), "control": path, **settings}
        receiver = stack.enter_context(Receiving(folder, name, **given))
        source = stack.enter_context(preempting(f"unix:{uri}"))
        if early:
            source.open(f"unix:{uri}")
        control = stack.enter_context(contextlib.closing(Control(path)))
        source.set_up()
        source.precopy()
        wait_until(lambda: 1 in source.back.pongs, "the first PONG", WAIT_S)
        if not early:
            source.open(f"unix:{uri}")
        if twice:
            source.other = connect(f"unix:{uri}")
        source.switch()
        source.wait_switched()
        yield receiver, source, control


@contextlib.contextmanager
def attached(receiver: Receiving, count: int = 1) -> Iterator[list[GuestProcess]]:
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(GuestProcess()) for _ in range(count)]
        for guest in guests:
            guest.ask("attach", receiver.attach)
        yield guests


def end(source: PreemptSource, *, eos: bool = False) -> None:
    """Everything, then the end of both channels, as QEMU does it."""
    source.postcopy()
    source._send(writer.ram_section(b"", last=True) + writer.eof())
    if eos:
        source.preempt.sendall(EOS)
    assert source.back.wait_shut() == 0
    source.close_preempt()


def shuts_down(source: PreemptSource) -> bool:
    return source.back.shut is not None or source.back.over


# --- pages ---


@pytest.mark.parametrize("guests", [1, 2])
@pytest.mark.parametrize("early", [False, True], ids=["8.0", "7.2"])
def test_a_page_that_is_asked_for_overtakes_the_main_channel(tmp_path, unique_name, early, guests):
    """Which stands still in the middle of a page."""
    with (
        migrating(tmp_path, unique_name, early=early) as (receiver, source, _),
        attached(receiver, guests) as everybody,
    ):
        half = writer.ram_section(source.oracle.records(0, [DATA[0]], source._final[0]))[:2000]
        rest = writer.ram_section(source.oracle.records(0, [DATA[0]], source._final[0]))[2000:]
        source._missing[0][DATA[0]] = 0
        source._send(half)
        for page in (DATA[9], ZEROS[3], DATA[10]):
            for guest in everybody:
                guest.say("visit", 0, [page])
            assert source.request() == (0, page)
            source.send_requested(0, [page])
            assert [guest.answer() for guest in everybody] == [None] * guests
        source._send(rest)
        end(source, eos=early)
        info = receiver.finish()
        assert [guest.ask("visit_all") for guest in everybody] == [[]] * guests
    assert info["status"] == "completed"
    assert info["sharded"]["preempt-pages"] == 3


def test_each_channel_goes_on_in_its_own_block(tmp_path, unique_name):
    """CONTINUE is the last block of that channel, whatever the other one names meanwhile."""
    with migrating(tmp_path, unique_name) as (receiver, source, _), attached(receiver) as (guest,):
        for number in range(6):
            source.send_pages(0, DATA[number * 8 : number * 8 + 8])
            source.send_requested(1, OTHER[number * 2 : number * 2 + 1])
            source.send_requested(1, OTHER[number * 2 + 1 : number * 2 + 2])
        end(source)
        receiver.finish()
        assert guest.ask("visit_all") == []


def test_the_main_channel_does_not_write_where_the_other_one_has(tmp_path, unique_name):
    """`continue`: the main channel's reader hopes for the next page while its wire is quiet,
    and that page comes on the other channel; what comes then is another page."""
    section = writer.ram_section(b"")
    with migrating(tmp_path, unique_name) as (receiver, source, _), attached(receiver) as (guest,):
        pairs = [page for page in DATA[::2] if page + 1 in DATA][:30]
        source._send(section[:SECTION_HEAD])
        for page in pairs:
            if not source._missing[0][page]:
                continue
            before = receiver.received()
            source._missing[0][page] = 0
            source._send(source._records(0, array("Q", [page]), source._final[0]))
            receiver.wait_received(before + 1)
            guest.say("visit", 0, [page + 1])
            assert source.request() == (0, page + 1)
            source.send_requested(0, [page + 1])
            assert guest.answer() is None
        source._send(section[SECTION_HEAD:])
        end(source)
        receiver.finish()
        assert guest.ask("visit_all") == []


def test_a_flood_on_both_channels(tmp_path, unique_name):
    """Three guests read everything at once while the background comes as fast as it goes."""
    with (
        migrating(tmp_path, unique_name, workers=3) as (receiver, source, _),
        attached(receiver, 3) as guests,
    ):
        for seed, guest in enumerate(guests):
            guest.say("visit_all", seed, threads=3)
        Background(lambda: end(source)).result()
        info = receiver.finish()
        assert [guest.answer() for guest in guests] == [[], [], []]
        assert [guest.ask("visit_all", 7) for guest in guests] == [[], [], []]
    totals = info["ram"]
    assert info["sharded"]["preempt-pages"] == source.requested_pages > 0
    assert totals["normal"] + totals["duplicate"] == 1280 + len(MISSING) + len(OTHER)


# --- the end ---


def test_pages_that_come_after_the_main_channels_end(tmp_path, unique_name):
    with migrating(tmp_path, unique_name) as (receiver, source, _), attached(receiver) as (guest,):
        guest.say("visit", 0, [DATA[5]])
        assert source.request() == (0, DATA[5])
        source._missing[0][DATA[5]] = 0
        source.postcopy()
        source._send(writer.ram_section(b"", last=True) + writer.eof())
        receiver.wait_received(1279)
        assert not shuts_down(source) and guest.silent()
        source.send_requested(0, [DATA[5]])
        assert guest.answer() is None
        assert source.back.wait_shut() == 0
        assert receiver.finish()["status"] == "completed"


def test_a_channel_that_was_there_early_is_awaited_to_its_end(tmp_path, unique_name):
    with migrating(tmp_path, unique_name, early=True) as (receiver, source, control):
        source.postcopy()
        source._send(writer.ram_section(b"", last=True) + writer.eof())
        receiver.wait_received(1280)
        assert control.execute("query-migrate")["status"] == "postcopy-active"
        assert not shuts_down(source)
        source.preempt.sendall(EOS)
        assert source.back.wait_shut() == 0
        assert receiver.finish()["status"] == "completed"


def test_who_was_there_early_and_never_speaks_is_not_awaited_for_ever(
    tmp_path, unique_name, monkeypatch, caplog
):
    """It may be no channel of the source at all."""
    monkeypatch.setattr(preempt, "END_SECONDS", 0.1)
    with migrating(tmp_path, unique_name, early=True) as (receiver, source, _):
        end(source)
        assert receiver.finish()["status"] == "completed"
    assert "it has not ended" in caplog.text


def test_a_source_that_keeps_pages_back_is_paused(tmp_path, unique_name, monkeypatch):
    """Both channels are quiet, or the other one ends as well."""
    monkeypatch.setattr(preempt, "QUIET_SECONDS", 0.3)
    with migrating(tmp_path, unique_name) as (_, source, control):
        source.send_requested(0, DATA[:1])
        source._send(writer.ram_section(b"", last=True) + writer.eof())
        assert "never sent" in control.wait_status("postcopy-paused")["error-desc"]


# --- trouble ---


@pytest.mark.parametrize("part", [0, 5, 3000])
def test_a_lost_channel_pauses_both_and_both_come_again(tmp_path, unique_name, part):
    """Anywhere in a record; what it had is asked for again."""
    with (
        migrating(tmp_path, unique_name) as (receiver, source, control),
        attached(receiver) as (guest,),
    ):
        source.send_requested(0, DATA[:20])
        guest.say("visit", 0, [DATA[30]])
        assert source.request() == (0, DATA[30])
        source.preempt.sendall(source.records(0, [DATA[30]])[:part])
        source.close_preempt()
        info = control.wait_status("postcopy-paused")
        assert "postcopy-preempt channel was lost" in info["error-desc"]
        wait_until(lambda: source.back.over, "the main channel to be hung up on", WAIT_S)
        uri = f"unix:{tmp_path}/again"
        assert control.execute("migrate-recover", uri=uri) == {}
        with contextlib.closing(connect(uri)) as sock:
            source.resume(sock)
            source.open(uri)
            assert source.request() == (0, DATA[30])
            source.send_requested(0, [DATA[30]])
            assert guest.answer() is None
            end(source)
            assert receiver.finish()["status"] == "completed"
        assert guest.ask("visit_all") == []


def test_many_cuts_in_a_flood(tmp_path, unique_name):
    """Of either channel, while guests read everything; every byte is right at first sight."""
    with contextlib.ExitStack() as stack:
        receiver, source, control = stack.enter_context(migrating(tmp_path, unique_name))
        guests = stack.enter_context(attached(receiver, 2))
        for seed, guest in enumerate(guests):
            guest.say("visit_all", seed, threads=2)
        for number in range(6):
            for _ in range(30):
                if source.back.requests:
                    source._serve(source.back.requests.popleft())
                if number % 2:
                    source._send_pages(*source._next_batch())
            source.send_requested(0, [source._missing[0].index(1)])  # it has spoken
            torn = source.preempt if number % 3 else source._sock
            torn.shutdown(socket.SHUT_RDWR)
            control.wait_status("postcopy-paused")
            uri = f"unix:{tmp_path}/again{number}"
            assert control.execute("migrate-recover", uri=uri) == {}
            sock = stack.enter_context(contextlib.closing(connect(uri)))
            source.preempt.close()
            source.resume(sock)
            source.open(uri)
        Background(lambda: end(source)).result()
        assert [guest.answer() for guest in guests] == [[], []]
        assert receiver.finish()["status"] == "completed"
        assert [guest.ask("visit_all", 7) for guest in guests] == [[], []]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ((0x1000 | 0x40).to_bytes(8, "big"), "XBZRLE"),
        ((1 << 40 | 0x08).to_bytes(8, "big") + b"\x06pc.ram", "outside"),
        ((0x1000 | 0x08).to_bytes(8, "big") + b"\x03abc", "unknown"),
    ],
    ids=["unsupported", "outside", "unknown block"],
)
def test_rubbish_on_the_channel_pauses(tmp_path, unique_name, said, why):
    with migrating(tmp_path, unique_name) as (receiver, source, control):
        source.send_requested(0, [DATA[0]])
        receiver.wait_received(1)
        source.preempt.sendall(said)
        info = control.wait_status("postcopy-paused")
        assert "the source's postcopy-preempt channel: " in info["error-desc"]
        assert why in info["error-desc"]


def test_a_second_one_pauses(tmp_path, unique_name):
    with migrating(tmp_path, unique_name, twice=True) as (_, source, control):
        source.send_requested(0, [DATA[0]])
        source.preempt, source.other = source.other, source.preempt
        source._preempt_named = None
        source.send_requested(0, [DATA[1]])
        info = control.wait_status("postcopy-paused")
        assert "second postcopy-preempt channel" in info["error-desc"]
        source.other.close()


@pytest.mark.parametrize("when", ["set-up", "before the package"])
def test_pages_before_any_was_asked_for_end_the_migration(tmp_path, unique_name, when):
    path = f"{tmp_path}/mig"
    with (
        pytest.raises(RemoteProtocolError, match="before any was asked for"),
        Receiving(tmp_path, unique_name, incoming=UnixAddress(path)) as receiver,
        preempting(f"unix:{path}") as source,
    ):
        source.set_up()
        if when != "set-up":
            source.precopy()
        wait_until(lambda: 1 in source.back.pongs, "the first PONG", WAIT_S)
        source.open(f"unix:{path}")
        source.preempt.sendall(source.records(0, [DATA[0]]))
        receiver.finish()


def test_a_channel_that_is_lost_before_the_guest_runs_fails_the_migration(tmp_path, unique_name):
    """As the main one would: the source is told, and a newer one goes on with its guest."""
    path = f"{tmp_path}/mig"
    with (
        pytest.raises(ConnectionLost, match=r"preempt channel was lost.*LISTENING.*not begun"),
        Receiving(tmp_path, unique_name, incoming=UnixAddress(path)) as receiver,
        preempting(f"unix:{path}") as source,
    ):
        source.set_up()
        source.precopy()
        receiver.coordinator.migration.load_devices = lambda _: Future()  # it loads and loads
        source.open(f"unix:{path}")
        source.switch()
        wait_until(lambda: 2 in source.back.pongs, "the discards", WAIT_S)
        control = receiver.coordinator.memory.control
        listening = PostcopyState.LISTENING
        wait_until(lambda: control.postcopy_state is listening, "LISTENING", WAIT_S)
        source.send_requested(0, DATA[:3])
        source.close_preempt()
        assert source.back.wait_shut() == 1
        receiver.finish()
