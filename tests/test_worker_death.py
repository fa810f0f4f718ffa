"""A worker dies or hangs: its successor takes over, and no guest notices more than a pause."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sharded_pc.cli import status
from sharded_pc.geometry import PAGE_BYTES, Placement
from sharded_pc.testing.oracle import DIRTIED
from sharded_pc.wire import writer
from tests.guest_process import GuestProcess, open_files
from tests.qemu import wait_until
from tests.synthetic import (
    BLOCKS,
    ORACLE,
    WAIT_S,
    Background,
    Receiving,
    StepSource,
    open_source,
)
from tests.workers import (
    MISSING,
    PAGE,
    STRIPE_PAGES,
    TOTAL,
    begin,
    bit,
    complete,
    kill,
    restarts_of,
    stop,
    wait_restarts,
)

pytestmark = [pytest.mark.uffd, pytest.mark.usefixtures("placement")]

# --- before the switch ---


def test_before_the_block_list(tmp_path, unique_name):
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        kill(receiver, 0)
        assert any("restarts 1" in line for line in status.lines(status.read(unique_name)))
        begin(receiver, source, guest)
        info = complete(receiver, source, guest)
    assert [shard["restarts"] for shard in info["sharded"]["shards"]] == [1, 0]


@pytest.mark.usefixtures("blind")
def test_while_it_is_told_the_block_list(tmp_path, unique_name):
    """The block list's reader waits for an answer that the dead worker did not give."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        stop(receiver.worker_pids()[1])
        source.set_up()
        geometry = lambda: receiver.coordinator.memory.geometry  # noqa: E731
        wait_until(lambda: geometry() is not None, "the block list", WAIT_S)
        kill(receiver)
        source.precopy()
        source.switch()
        source.wait_switched()
        guest.ask("attach", receiver.attach)
        complete(receiver, source, guest)


@pytest.mark.usefixtures("blind")
def test_with_discards_in_its_ring(tmp_path, unique_name, placement):
    """`copy`: the successor does what its predecessor did not come to."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        source.set_up()
        source.precopy()
        shards = receiver.coordinator.memory.control.shards
        source._send(writer.discard(BLOCKS[0].name, [(PAGE * PAGE_BYTES, PAGE_BYTES)]))
        totals = lambda: receiver.coordinator.memory.control.totals  # noqa: E731
        wait_until(lambda: totals().discarded and not shards()[1].queued, "a discard", WAIT_S)
        stop(receiver.worker_pids()[1])
        source.switch()
        if placement is Placement.COPY:
            wait_until(lambda: shards()[1].queued >= 5, "discards", WAIT_S)
        kill(receiver)
        source.wait_switched()
        guest.ask("attach", receiver.attach)
        complete(receiver, source, guest)


# --- a guest waits ---


@pytest.mark.parametrize("signo", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_page_that_was_asked_for(tmp_path, unique_name, signo):
    """It is asked for again: the first request may have been lost on its way."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        begin(receiver, source, guest)
        guest.say("visit", 0, [PAGE])
        assert source.request() == (0, PAGE)
        kill(receiver, 1, signo)
        assert source.request() == (0, PAGE)
        assert guest.silent()
        source.send_pages(0, [PAGE])
        assert guest.answer() is None
        complete(receiver, source, guest)


def test_a_page_that_was_claimed_and_not_asked_for(tmp_path, unique_name):
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        begin(receiver, source, guest)
        assert receiver.coordinator.memory.requested.claim(bit(receiver, PAGE))
        kill(receiver)
        guest.say("visit", 0, [PAGE])
        assert source.request() == (0, PAGE)
        complete(receiver, source, guest, waiting=True)


@pytest.mark.usefixtures("blind")
def test_a_fault_that_was_read_and_no_more(tmp_path, unique_name):
    """Its message is gone with the dead worker: the waiter is woken, and faults once more."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        begin(receiver, source, guest)
        stop(receiver.worker_pids()[1])
        guest.say("visit", 0, [PAGE])
        uffd = receiver.coordinator.shards.guests._uffds[0][1]
        assert len(Background(lambda: os.read(uffd, 32)).result()) == 32
        kill(receiver)
        assert source.request() == (0, PAGE)
        complete(receiver, source, guest, waiting=True)


def test_it_was_writing_on_the_return_path(tmp_path, unique_name):
    """Nobody else may, until its word is taken back."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        begin(receiver, source, guest)
        receiver.coordinator.memory.control.raw.back_writer = 2
        guest.say("visit", 0, [MISSING[0]])
        wait_until(lambda: receiver.coordinator.memory.requested.test(bit(receiver, MISSING[0])),
                   "the claim", WAIT_S)  # fmt: skip
        assert not source.back.requests
        kill(receiver)
        assert source.request() == (0, MISSING[0])
        complete(receiver, source, guest, waiting=True)


def test_a_page_that_was_copied_and_not_marked(tmp_path, unique_name, placement):
    """`copy`: it stands there, and its guest may have written to it."""
    if placement is not Placement.COPY:
        pytest.skip("n/a: with continue the coordinator marks pages")
    page = next(p for p in MISSING if p >= STRIPE_PAGES and ORACLE.final(0)[p] == DIRTIED)
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        begin(receiver, source, guest)
        own = bytes([7]) * PAGE_BYTES
        os.pwrite(receiver.coordinator.memory.blocks[0].fd, own, page * PAGE_BYTES)
        kill(receiver)
        source.send_pages(0, [page])
        wait_until(lambda: receiver.coordinator.memory.received.test(bit(receiver, page)),
                   "the mark", WAIT_S)  # fmt: skip
        fd = receiver.coordinator.memory.blocks[0].fd
        assert os.pread(fd, PAGE_BYTES, page * PAGE_BYTES) == own
        source.end()
        receiver.finish()


def test_a_guest_comes_while_there_is_no_worker(tmp_path, unique_name):
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        begin(receiver, source)
        for pid in receiver.worker_pids():
            os.kill(pid, signal.SIGKILL)
        guest.ask("attach", receiver.attach)
        guest.say("visit", 0, [PAGE])
        assert source.request() == (0, PAGE)
        complete(receiver, source, guest, waiting=True)
        assert restarts_of(receiver) == [1, 1]


# --- in the middle of it all ---


def flooded(source: StepSource, *guests: GuestProcess) -> Background:
    """All guests read everything while it comes."""
    for seed, guest in enumerate(guests):
        guest.say("visit_all", seed, threads=4)
    wait_until(lambda: len(source.back.requests) >= 4 * len(guests), "requests", WAIT_S)
    return Background(source.postcopy)


def survive(receiver: Receiving, bandwidth: int, kills: Callable[[Receiving], None]) -> dict:
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(GuestProcess()) for _ in range(3)]
        source = stack.enter_context(open_source(receiver.sock, bandwidth=bandwidth))
        begin(receiver, source, *guests)
        flood = flooded(source, *guests)
        kills(receiver)
        flood.result()
        assert [guest.answer() for guest in guests] == [[], [], []]
        source.finish()
        info = receiver.finish()
        assert [guest.ask("visit_all", 7) for guest in guests] == [[], [], []]
    assert [block["received-pages"] for block in info["blocks"]] == [b.pages for b in BLOCKS]
    return info


def test_ten_kills_in_a_flood(tmp_path, unique_name):
    def kills(receiver: Receiving) -> None:
        for n in range(10):
            kill(receiver, n % 3)

    with Receiving(tmp_path, unique_name, workers=3) as receiver:
        info = survive(receiver, 2 << 20, kills)
    assert [shard["restarts"] for shard in info["sharded"]["shards"]] == [4, 3, 3]


def test_all_workers_at_once(tmp_path, unique_name):
    def kills(receiver: Receiving) -> None:
        for pid in receiver.worker_pids():
            os.kill(pid, signal.SIGKILL)
        wait_restarts(receiver, 3)

    with Receiving(tmp_path, unique_name, workers=3) as receiver:
        info = survive(receiver, 8 << 20, kills)
    assert [shard["restarts"] for shard in info["sharded"]["shards"]] == [1, 1, 1]


def userfaultfds(pid: int) -> int:
    return sum("userfaultfd" in target for target in open_files(pid))


@pytest.mark.usefixtures("blind")
def test_at_the_end(tmp_path, unique_name):
    """It dies while it lets a guest go: a guest whose memory stayed registered would wait for ever
    at the first hole."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        begin(receiver, source, guest)
        source.postcopy()
        receiver.wait_received(TOTAL)
        shards = receiver.coordinator.memory.control.shards
        wait_until(lambda: not any(shard.queued for shard in shards()), "empty rings", WAIT_S)
        going, stopped = receiver.worker_pids()
        before = userfaultfds(going)
        stop(stopped)
        ending = Background(source.finish)
        wait_until(lambda: userfaultfds(going) < before, "the other worker's release", WAIT_S)
        kill(receiver)
        ending.result()
        receiver.finish()
        flags = Path(f"/proc/{guest.pid}/smaps").read_text()
        assert " um" not in flags and " ui" not in flags, "registered memory (proc(5), VmFlags)"
        assert guest.ask("wait") is True
        assert guest.ask("visit_all") == []
