"""A Python guest whose receiver goes away: it waits, and a successor takes it over."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc.attach import protocol
from sharded_pc.native.uffd import Uffd
from tests.guest_process import GuestFailed, GuestProcess
from tests.preload_kit import MIB, Connection, FakeReceiver, fake, place_where_it_waits, ram
from tests.qemu import wait_until
from tests.synthetic import ORACLE, WAIT_S, connect
from tests.test_resume import DATA, begun, kill, resumed

pytestmark = pytest.mark.uffd

WHO = "sharded_pc guest: "
RAM = 'pc "ü\\'
"""What the fake calls its first block."""
READY, COMPLETED = protocol.event(protocol.READY), protocol.event(protocol.COMPLETED)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[GuestProcess]:
    with GuestProcess() as guest:
        guest.ask("say_into", str(tmp_path / "said"))
        yield guest


def said(folder: Path) -> list[str]:
    """The lines that the guest has printed."""
    lines = (folder / "said").read_text().splitlines()
    assert all(line.startswith(WHO) for line in lines), lines
    return [line.removeprefix(WHO) for line in lines]


@contextlib.contextmanager
def attached(fake: FakeReceiver, guest: GuestProcess, ready: bool = True) -> Iterator[Connection]:
    """A connection over which the guest has attached; the receiver dies with the block."""
    guest.say("attach", str(fake.path), wait_ready=ready)
    with fake.connection() as connection:
        connection.addresses = connection.attach(fake.offer())
        if ready:
            connection.say(READY)
        assert guest.answer()["number"] == 0
        yield connection


def faults(connection: Connection) -> int:
    """The userfaultfd on which somebody waits for a page."""
    ready, _, _ = select.select(connection.heard_fds, [], [], WAIT_S)
    assert ready, "nobody touches a page"
    return ready[0]


def serve(connection: Connection, addresses: dict, content: bytes) -> int:
    """What a successor does: it wakes who waits, and places what is asked for then."""
    for uffd in connection.heard_fds:
        Uffd(uffd).wake(addresses[RAM], 2 * MIB)
        Uffd(uffd).wake(addresses[RAM] + 2 * MIB, 2 * MIB)
    return place_where_it_waits(faults(connection), content) - addresses[RAM]


# --- with real receivers ---


@pytest.mark.usefixtures("placement")
def test_the_only_thread_waits_through_two_deaths(tmp_path, unique_name):
    """It holds the GIL.  Coordinator and workers are killed, and so are their successors."""
    offset = DATA[100] * 4096 + 7
    right = ORACLE.page(0, DATA[100], ORACLE.final(0)[DATA[100]])[7]
    with begun(tmp_path, unique_name) as (receiver, source, guest):
        guest.say("read", "pc.ram", offset)
        while source.request() != (0, DATA[100]):
            ...  # those of pages that it has visited before
        kill(receiver, workers=True)
        with resumed(receiver) as (first, _):
            wait_until(lambda: guests(first) == 1, "the guest", WAIT_S)
            kill(first, workers=True)
            with resumed(receiver) as (second, control):
                uri = f"unix:{tmp_path / 'again'}"
                assert control.execute("migrate-recover", uri=uri) == {}
                with contextlib.closing(connect(uri)) as sock:
                    source.resume(sock)
                    assert guest.silent()
                    source.end()
                    assert second.finish().exit_code == 0
        assert guest.answer() == right
        assert guest.ask("wait") is True
        assert guest.ask("userfaultfds") == 0
        assert guest.ask("visit_all") == []


def guests(receiver) -> int:
    return receiver.status()["sharded"]["guests"]


# --- with a fake receiver ---


def test_the_same_descriptors_again(fake, guest):
    """Two times; a page is asked for of the first receiver and comes from the third."""
    with attached(fake, guest) as connection:
        kept = guest.ask("userfaultfds")
        guest.say("read", RAM, 5000)
        faults(connection)
    for _ in range(2):
        with fake.connection() as connection:
            connection.attach(fake.offer())
            assert guest.silent()
    with fake.connection() as connection:
        addresses = connection.attach(fake.offer())
        assert serve(connection, addresses, b"s" * 4096) & -4096 == 4096
        assert guest.answer() == ord("s")
        assert guest.ask("userfaultfds") == kept == 2
        guest.say("wait")
        connection.say(COMPLETED)
        assert guest.answer() is True
        assert guest.ask("userfaultfds") == 0
        assert connection.hear() is None


def test_a_successor_that_deals_otherwise(fake, guest):
    """It is refused, and the next one is tried; so is one that places in another way."""
    with attached(fake, guest):
        guest.say("read", RAM, 5000)
    for changes in ({"shards": 1}, {"stripe-size": MIB}, {"mode": "missing+minor"}):
        with fake.connection() as connection:
            connection.hear()
            connection.say(fake.offer(**changes), with_ram=True)
            assert connection.hear() is None, changes
    with fake.connection() as connection:
        serve(connection, connection.attach(fake.offer()), b"o" * 4096)
        assert guest.answer() == ord("o")


def test_who_waits_is_told_what_happens(tmp_path, fake, guest):
    """wait() is silent while nobody is there, tells once that a migration failed, and returns when
    a successor has all; a thread that waits without a timeout returns then, too."""
    with attached(fake, guest) as connection, fake.gone():
        connection.say(protocol.event(protocol.FAILED, "the source died"))
        with pytest.raises(GuestFailed, match="AttachError: the migration failed: the source died"):
            guest.ask("wait")
    guest.ask("wait_in_thread")
    with pytest.raises(GuestFailed, match="TimeoutError: not completed in 0"):
        guest.ask("wait", timeout=0.1)
    with fake.connection() as connection:
        connection.attach(fake.offer())
    with fake.connection() as connection:
        connection.hear()
        connection.say(protocol.error("not yet"))
    with fake.connection() as connection:  # everything has arrived meanwhile
        connection.attach(fake.offer(mode=None))
        assert connection.heard_fds == []
        connection.say(COMPLETED)
        assert guest.ask("wait") is True
    guest.ask("waited")
    assert guest.ask("userfaultfds") == 0
    assert [line for line in said(tmp_path) if "connect to" not in line] == [
        "the migration failed: the source died; accesses to missing pages wait, attaching again",
        "attached again",
        "the receiver is gone; accesses to missing pages wait, attaching again",
        "attach again: the receiver refused: not yet; trying on",
        "attached again",
    ]


def test_a_receiver_that_goes_before_memory_may_be_touched(fake, guest):
    """Nothing is lost then: who waits is told; a successor is welcome all the same."""
    with attached(fake, guest, ready=False):
        guest.say("wait_ready")
    with pytest.raises(GuestFailed, match="AttachError: the receiver is gone"):
        guest.answer()
    with fake.connection() as connection:
        connection.attach(fake.offer())
        guest.say("wait_ready")
        connection.say(READY)
        assert guest.answer() is False


@pytest.mark.parametrize("tries", [False, True])
def test_close_while_nobody_is_there(tmp_path, fake, guest, tries):
    """At once, and after it has tried to find somebody."""
    with attached(fake, guest):
        pass
    with fake.gone():
        if tries:
            wait_until(
                lambda: "connect to" in "".join(said(tmp_path)), "the guest's first try", WAIT_S
            )
        guest.say("close")
        guest.answer(timeout=2)
        assert guest.ask("userfaultfds") == 0


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_close_in_the_middle_of_a_hand_over(fake, guest, steps):
    """A successor that falls silent keeps nobody from closing."""
    with attached(fake, guest):
        pass
    with fake.connection() as connection:
        assert connection.hear() == protocol.attach()
        if steps:
            connection.say(fake.offer(), with_ram=True)
            connection.hear()
        if steps > 1:
            connection.say_bytes(b'{"attached": {"gue')
        guest.ask("wait_in_thread")
        guest.say("close")
        guest.answer(timeout=2)
        assert guest.ask("userfaultfds") == 0
        with pytest.raises(GuestFailed, match="AttachError: this guest is closed"):
            guest.ask("waited")


def test_a_close_that_is_refused_changes_nothing(fake, guest):
    """Views of the memory are in use: the receiver, and the next one, go on to serve it."""
    with attached(fake, guest) as connection:
        addresses = connection.addresses
        guest.say("close_in_use", RAM, 5000)
        place_where_it_waits(faults(connection), b"u" * 4096)
        assert guest.answer() == ord("u")
    with fake.connection() as connection:
        assert connection.attach(fake.offer()) == addresses
    guest.ask("close")
    assert guest.ask("userfaultfds") == 0


def test_a_child_that_closes_disturbs_nobody(fake, guest):
    with attached(fake, guest) as connection:
        assert guest.ask("child_closes") == 0
        guest.say("read", RAM, 5000)
        place_where_it_waits(faults(connection), b"c" * 4096)
        assert guest.answer() == ord("c")
    with fake.connection() as connection:
        connection.attach(fake.offer())
        guest.say("wait")
        connection.say(COMPLETED)
        assert guest.answer() is True


def test_an_interrupt_ends_attaching(fake, guest):
    """Ctrl-C, while a receiver does not know its RAM yet and no time was given."""
    guest.say("attach", str(fake.path), timeout=None)
    with fake.connection() as connection:
        assert connection.hear() == protocol.attach()
        os.kill(guest.pid, signal.SIGINT)
        assert connection.hear() is None
    guest.process.join(WAIT_S)
    assert guest.process.exitcode == 1


def test_nobody_reads_what_is_said(fake, guest):
    """A full pipe for stderr keeps no guest from its successor."""
    guest.ask("say_into_full_pipe")
    with attached(fake, guest):
        guest.say("read", RAM, 5000)
    with fake.connection() as connection:
        serve(connection, connection.attach(fake.offer()), b"n" * 4096)
        assert guest.answer() == ord("n")
