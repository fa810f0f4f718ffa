"""A connection that is lost while the guest runs: a pause, and QEMU's recovery from it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc.address import UnixAddress
from sharded_pc.errors import ConnectionLost
from sharded_pc.testing.oracle import DIRTIED
from sharded_pc.wire import writer
from tests.control import Control
from tests.guest_process import Counters, GuestProcess
from tests.qemu import wait_until
from tests.receiver import Receiver
from tests.synthetic import (
    BLOCKS,
    ORACLE,
    WAIT_S,
    Background,
    Receiving,
    StepSource,
    connect,
    missing_pages,
    open_source,
)

pytestmark = [pytest.mark.uffd, pytest.mark.usefixtures("placement")]

MISSING = missing_pages(ORACLE, 0)
DATA = missing_pages(ORACLE, 0, DIRTIED)


@contextlib.contextmanager
def migrating(tmp_path: Path, name: str, **settings) -> Iterator[tuple]:
    """A receiver whose guest runs on nothing but precopied pages, its source, a control client."""
    path = str(tmp_path / f"{name}.control")
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(Receiving(tmp_path, name, control=path, **settings))
        source = stack.enter_context(open_source(receiver.sock))
        control = stack.enter_context(contextlib.closing(Control(path)))
        source.begin()
        source.wait_switched()
        yield receiver, source, control


def cut(source: StepSource) -> None:
    source._sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def recovered(source: StepSource, control: Control, uri: str) -> Iterator[None]:
    """The source goes on over another socket."""
    assert control.execute("migrate-recover", uri=uri) == {}
    with contextlib.closing(connect(uri)) as sock:
        source.resume(sock)
        yield
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        source.back._thread.join(WAIT_S)


def lost(source: StepSource) -> list[int]:
    """Pages of the first block that the source took for sent."""
    return [page for page, missing in enumerate(source._missing[0]) if not missing]


def test_a_cut_pauses_and_a_recovery_goes_on_where_it_stopped(tmp_path, unique_name):
    """Invariant 6: QEMU's words, events and handshake; what had arrived is not sent again, what was
    asked for and got lost is asked for again."""
    with migrating(tmp_path, unique_name) as (receiver, source, control), GuestProcess() as guest:
        guest.ask("attach", receiver.attach)
        source.send_pages(0, DATA[:50])
        guest.say("visit", 0, DATA[60:61])
        assert source.request() == (0, DATA[60])
        receiver.wait_received(sum(b.pages for b in BLOCKS) - len(MISSING) + 50
                               - len(missing_pages(ORACLE, 1)))  # fmt: skip
        here = lost(source)
        cut(source)
        info = control.wait_status("postcopy-paused")
        assert "connection to the source was lost" in info["error-desc"]
        assert guest.silent(), "its page is at the source"
        uri = f"unix:{tmp_path / 'again'}"
        with recovered(source, control, uri):
            assert lost(source) == here, "the bitmap says what is here"
            assert source.request() == (0, DATA[60])
            assert control.wait_status("postcopy-active")["error-desc"] is None
            source.send_pages(0, DATA[60:61])
            assert guest.answer() is None
            source.end()
            assert receiver.finish()["status"] == "completed"
        assert guest.ask("visit_all") == []
        control.hear()
    assert control.events == [
        "active", "postcopy-active", "postcopy-paused", "postcopy-recover-setup",
        "postcopy-recover", "postcopy-active", "completed",
    ]  # fmt: skip


def test_many_cuts_in_a_flood(tmp_path, unique_name):
    """Three guests read everything while the wire is cut again and again, anywhere in the stream;
    every byte is right at first sight."""
    with contextlib.ExitStack() as stack:
        receiver, source, control = stack.enter_context(migrating(tmp_path, unique_name))
        guests = [stack.enter_context(GuestProcess()) for _ in range(3)]
        for seed, guest in enumerate(guests):
            guest.ask("attach", receiver.attach)
            guest.say("visit_all", seed, threads=2)
        source._sock.settimeout(WAIT_S)
        for number in range(8):
            torn(source, number)
            control.wait_status("postcopy-paused")
            sock = connect_again(control, f"unix:{tmp_path}/again{number}")
            stack.callback(sock.close)
            source.resume(sock)
        Background(source.end).result()
        assert [guest.answer() for guest in guests] == [[], [], []]
        info = receiver.finish()
        assert [guest.ask("visit_all", 7) for guest in guests] == [[], [], []]
    assert info["status"] == "completed" and info["error-desc"] is None


def connect_again(control: Control, uri: str) -> socket.socket:
    assert control.execute("migrate-recover", uri=uri) == {}
    return connect(uri)


def torn(source: StepSource, number: int) -> None:
    """Some pages, then a part of a section: the cut falls into a header, a page, a footer."""
    source.send_pages(0, DATA[number * 40 : number * 40 + 20])
    pages = DATA[number * 40 + 20 : number * 40 + 24]
    records = source._oracle.records(0, array("Q", pages), source._final[0], go_on=True)
    whole = writer.ram_section(records)
    source._send(whole[: (3, 9, 17, 2000, 4200, 9000, len(whole) - 7, len(whole) - 2)[number]])
    cut(source)


def test_a_cut_during_recovery_goes_back_to_paused(tmp_path, unique_name):
    """Before a word, after a bitmap's request, after the bitmaps; a source that says rubbish, names
    a block that is not there, or begins a new migration, is not taken either."""
    uri = f"unix:{tmp_path / 'again'}"
    openings = {
        "nothing": b"",
        "half a command": writer.recv_bitmap("pc.ram")[:4],
        "one bitmap": writer.recv_bitmap("pc.ram"),
        "all bitmaps": b"".join(writer.recv_bitmap(b.name) for b in BLOCKS),
        "an unknown block": writer.recv_bitmap("no.such"),
        "something else behind it": writer.recv_bitmap("pc.ram") + writer.ping(1),
        "rubbish behind it": writer.recv_bitmap("pc.ram") + b"\xff" * 20,
    }
    with migrating(tmp_path, unique_name) as (receiver, source, control):
        cut(source)
        control.wait_status("postcopy-paused")
        for opening in openings.values():
            sock = connect_again(control, uri)
            sock.sendall(opening)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
            sock.close()
            if len(opening) > 4:
                control.wait_status("postcopy-paused")
        with recovered(source, control, uri):
            source.end()
            assert receiver.finish()["status"] == "completed"


def test_strangers_do_not_recover(tmp_path, unique_name):
    """A new migration's source where the paused one's is awaited is sent away; the right one is
    still awaited."""
    uri = f"unix:{tmp_path / 'again'}"
    with migrating(tmp_path, unique_name) as (receiver, source, control):
        cut(source)
        control.wait_status("postcopy-paused")
        stranger = connect_again(control, uri)
        stranger.sendall(writer.header() + writer.configuration("pc"))
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b"", "it is sent away"
        stranger.close()
        assert control.execute("query-migrate")["status"] == "postcopy-recover-setup"
        with contextlib.closing(connect(uri)) as sock:
            source.resume(sock)
            source.end()
            assert receiver.finish()["status"] == "completed"


def test_qemus_errors(tmp_path, unique_name):
    paused = "Migrate recover can only be run when postcopy is paused."
    active = (
        "migrate-pause is currently only supported during postcopy-active or postcopy-recover state"
    )
    with migrating(tmp_path, unique_name) as (receiver, source, control):
        assert control.execute("migrate-recover", uri="unix:/nowhere") == paused
        assert control.execute("migrate-recover") == "Parameter 'uri' is missing"
        assert control.execute("migrate-recover", uri=1) == (
            "Invalid parameter type for 'uri', expected: string"
        )
        assert control.execute("migrate-pause", uri="x") == "Parameter 'uri' is unexpected"
        assert control.execute("migrate-pause") == {}
        assert control.wait_status("postcopy-paused")["error-desc"] == "paused on request"
        assert control.execute("migrate-pause") == active
        assert "expected tcp:HOST:PORT" in control.execute("migrate-recover", uri="nonsense")
        assert "No such file" in control.execute("migrate-recover", uri=f"unix:{tmp_path}/no/where")
        assert "no way back" in control.execute("migrate-recover", uri=f"file:{tmp_path}/x")
        assert control.execute("query-migrate")["status"] == "postcopy-paused"
        for uri in (f"unix:{tmp_path}/one", "tcp:127.0.0.1:0", f"unix:{tmp_path}/one"):
            assert control.execute("migrate-recover", uri=uri) == {}, "another place instead"
            assert control.execute("query-migrate")["status"] == "postcopy-recover-setup"
        assert "No such" in control.execute("migrate-recover", uri=f"unix:{tmp_path}/no/where")
        assert control.execute("query-migrate")["status"] == "postcopy-paused", "nobody is awaited"
        assert control.execute("migrate-recover", uri=f"unix:{tmp_path}/one") == {}
        with contextlib.closing(connect(f"unix:{tmp_path}/one")) as sock:
            source.resume(sock)
            source.end()
            receiver.finish()


def test_pages_that_a_recovery_sends_again_change_nothing(tmp_path, unique_name):
    """A source that sends all pages again, for whatever reason: guests keep what they wrote."""
    written = bytes([99]) * BLOCKS[0].pages
    with migrating(tmp_path, unique_name) as (receiver, source, control), GuestProcess() as guest:
        guest.ask("attach", receiver.attach)
        source.send_pages(0, DATA[:40])
        assert guest.ask("visit", 0, DATA[:20], None, written) is None
        cut(source)
        control.wait_status("postcopy-paused")
        with recovered(source, control, f"unix:{tmp_path / 'again'}"):
            source.again(0, DATA[:40])
            source.end()
            receiver.finish()
        assert guest.ask("visit", 0, DATA[:20], written) is None
        assert guest.ask("visit", 0, DATA[20:]) is None


@pytest.mark.parametrize("rubbish", [b"\xff" * 4096, b"\x04" + b"\0" * 60, b"\x02\0\0\0\x07"])
def test_a_stream_that_turns_to_rubbish_pauses(tmp_path, unique_name, rubbish):
    with migrating(tmp_path, unique_name) as (receiver, source, control):
        source.send_pages(0, DATA[:40])
        source._send(rubbish)
        control.wait_status("postcopy-paused")
        wait_until(lambda: source.back.over, "the source to be hung up on", WAIT_S)
        assert source.back.error is None, "it had to wait for its own timeout"
        with recovered(source, control, f"unix:{tmp_path / 'again'}"):
            source.end()
            assert receiver.finish()["status"] == "completed"


def test_an_early_end_of_the_stream_pauses(tmp_path, unique_name):
    """EOF with pages never sent is no end: they are asked for once the source is back."""
    with migrating(tmp_path, unique_name) as (receiver, source, control):
        source._send(writer.ram_section(b"", last=True) + writer.eof())
        assert "never sent" in control.wait_status("postcopy-paused")["error-desc"]
        with recovered(source, control, f"unix:{tmp_path / 'again'}"):
            source.end()
            assert receiver.finish()["status"] == "completed"


def test_a_guest_goes_on_on_what_it_has(tmp_path, unique_name):
    """While paused: pages that are here can be touched, others wait, however many threads ask."""
    counters = Counters(tmp_path / "counters")
    with migrating(tmp_path, unique_name) as (receiver, source, control), GuestProcess() as guest:
        source.send_pages(0, DATA[:64])
        receiver.wait_received(1)
        guest.ask("attach", receiver.attach)
        cut(source)
        control.wait_status("postcopy-paused")
        path = str(tmp_path / "counters")
        guest.ask("keep_touching", path, (0, DATA[70]), 0, DATA[:32])
        seen = counters["visits"]
        wait_until(lambda: counters["visits"] > seen + 2000, "more visits", WAIT_S)
        assert (counters["arrived"], counters["wrong"]) == (0, 0)
        with recovered(source, control, f"unix:{tmp_path / 'again'}"):
            assert source.request() == (0, DATA[70]), "asked for while there was nobody to ask"
            source.send_pages(0, [DATA[70]])
            wait_until(lambda: counters["arrived"], "the page", WAIT_S)
            source.end()
            receiver.finish()
        assert counters["wrong"] == 0


def test_a_guest_may_come_while_paused(tmp_path, unique_name):
    with migrating(tmp_path, unique_name) as (receiver, source, control), GuestProcess() as guest:
        cut(source)
        control.wait_status("postcopy-paused")
        guest.ask("attach", receiver.attach)
        guest.say("visit_all")
        with recovered(source, control, f"unix:{tmp_path / 'again'}"):
            source.end()
            receiver.finish()
        assert guest.answer() == []


def test_the_source_comes_again_unasked(tmp_path, unique_name):
    """--recover-uri: nobody speaks to the control socket; twice."""
    uri = f"unix:{tmp_path / 'again'}"
    with migrating(tmp_path, unique_name, recover_uri=UnixAddress(uri[5:])) as parts:
        receiver, source, control = parts
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                source.send_pages(0, [DATA.pop()])
                cut(source)
                control.wait_status("postcopy-recover-setup")
                sock = stack.enter_context(contextlib.closing(connect(uri)))
                source.resume(sock)
            source.end()
            assert receiver.finish()["status"] == "completed"
    assert not Path(uri[5:]).exists()


def test_a_guest_that_does_not_run_yet_cannot_be_recovered(tmp_path, unique_name):
    """In precopy a cut is a failure: the source goes on with its guest."""
    with Receiving(tmp_path, unique_name) as receiver, open_source(receiver.sock) as source:
        source.set_up()
        source.precopy()
        cut(source)
        with pytest.raises(Exception, match="closed the stream before the migration was complete"):
            receiver.finish()


def test_the_end_of_a_paused_receiver(tmp_path, unique_name):
    """The operator gives up: exit code 5, what is missing is counted and listed."""
    receiver = Receiver(tmp_path, unique_name, keep=False, control=True)
    with receiver, open_source(connect(receiver.uri())) as source:
        source.begin()
        source.wait_switched()
        source.send_pages(0, DATA[:40])
        cut(source)
        outcome = receiver.give_up()
    assert (outcome.exit_code, outcome.info["status"]) == (5, "failed")
    left = {b.name: set(missing_pages(ORACLE, n)) for n, b in enumerate(BLOCKS)}
    left["pc.ram"] -= set(DATA[:40])
    listed = {name: {page for first, n in spans for page in range(first, first + n)}
              for name, spans in outcome.info["sharded"]["missing"].items()}  # fmt: skip
    assert listed == left
    assert outcome.info["ram"]["remaining"] == 4096 * sum(map(len, left.values()))
    assert "ended on request while paused: the connection" in outcome.info["error-desc"]


def test_a_signal_ends_a_paused_receiver(tmp_path, unique_name):
    receiver = Receiver(tmp_path, unique_name, keep=False)
    with receiver, open_source(connect(receiver.uri())) as source:
        source.begin()
        source.wait_switched()
        cut(source)
        wait_until(lambda: receiver.status()["status"] == "postcopy-paused", "the pause", WAIT_S)
        assert "paused: the connection to the source was lost" in receiver.stderr()
        os.kill(receiver.pid, signal.SIGTERM)
        assert receiver.finish().exit_code == 143


def test_over_tcp_that_is_reset(tmp_path, unique_name):
    """RST instead of FIN, and the way on by TCP."""
    receiver = Receiver(tmp_path, unique_name, "tcp:127.0.0.1:0", control=True, keep=False)
    with receiver, GuestProcess() as guest:
        host, port = receiver.uri()[4:].rsplit(":", 1)
        with open_source(socket.create_connection((host, int(port)), WAIT_S)) as source:
            source.begin()
            source.wait_switched()
            guest.ask("attach", str(receiver.attach_path))
            guest.say("visit", 0, [DATA[3]])
            assert source.request() == (0, DATA[3])
            linger = struct.pack("ii", 1, 0)
            source._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            source._sock.shutdown(socket.SHUT_RD)
            source.back._thread.join(WAIT_S)
            source._sock.close()
            with contextlib.closing(Control(receiver.control_path)) as control:
                control.wait_status("postcopy-paused")
                assert control.execute("migrate-recover", uri="tcp:127.0.0.1:0") == {}
                port = int(receiver.stderr().rpartition("go on at tcp:127.0.0.1:")[2].split()[0])
                with contextlib.closing(socket.create_connection((host, port), WAIT_S)) as sock:
                    source.resume(sock)
                    assert source.request() == (0, DATA[3])
                    source.end()
                    assert receiver.finish().exit_code == 0
        assert guest.answer() is None


def test_lost_pages_are_counted_by_an_ending_that_was_no_pause(tmp_path, unique_name):
    """ConnectionLost is what ends it, with the reason of the pause."""
    with migrating(tmp_path, unique_name) as (receiver, source, control):
        cut(source)
        control.wait_status("postcopy-paused")
        control.execute("quit")
        with pytest.raises(ConnectionLost, match="pages are still there"):
            receiver.finish()
