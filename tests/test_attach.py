"""The attach socket: guests of every age get right bytes, bad clients an error and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharded_pc
from sharded_pc import shm
from sharded_pc.attach import protocol
from sharded_pc.errors import AttachError
from sharded_pc.geometry import Placement
from tests.attach_clients import (
    GREETINGS,
    HANDOVERS,
    SHARDS,
    SILENCES,
    Client,
    Table,
    address,
    descriptors,
    greeting,
    without_handshake,
)
from tests.guest_process import GuestProcess
from tests.qemu import wait_until
from tests.synthetic import BLOCKS, ORACLE, WAIT_S, Receiving, missing_pages, open_source

pytestmark = [pytest.mark.uffd, pytest.mark.usefixtures("placement")]

MISSING = missing_pages(ORACLE, 0)


@pytest.fixture
def receiver(tmp_path: Path, unique_name: str) -> Iterator[Receiving]:
    with Receiving(tmp_path, unique_name, workers=SHARDS) as receiver:
        yield receiver


@pytest.fixture
def source(receiver: Receiving) -> Iterator:
    with open_source(receiver.sock) as source:
        yield source


def guests(receiver: Receiving) -> int:
    return receiver.coordinator.memory.control.view.n_guests


# --- when guests come ---


def test_guests_of_every_age_see_the_right_bytes(receiver, source):
    """Guests that attach before the geometry is known, during precopy and when most pages are
    missing: READY comes with LISTENING and not before, COMPLETED with the last page."""
    with GuestProcess() as early, GuestProcess() as middle, GuestProcess() as late:
        early.say("attach", receiver.attach)
        source.set_up()
        wait_until(lambda: guests(receiver) == 1, "the early guest", WAIT_S)
        assert middle.ask("attach", receiver.attach, wait_ready=False)["completed"] is False
        middle.say("wait_ready")
        source.precopy()
        receiver.wait_received(sum(block.pages for block in BLOCKS))
        assert early.silent() and middle.silent(), "READY before LISTENING"
        source.switch()
        assert {early.answer()["number"], late.ask("attach", receiver.attach)["number"]} == {0, 2}
        assert middle.answer() is False, "READY is not COMPLETED"
        for seed, guest in enumerate((early, middle, late)):
            guest.say("visit_all", seed, threads=2)
        source.send_pages(0, MISSING[:50])
        source.end()
        for guest in (early, middle, late):
            assert guest.answer() == []
            assert guest.ask("wait") is True
            assert guest.ask("wait") is True, "completed stays completed"
        receiver.finish()


def test_one_of_three_guests_is_killed_in_the_middle(receiver, source):
    """Three processes on the same RAM wait for pages; one dies: the others go on and finish."""
    with GuestProcess() as one, GuestProcess() as two, GuestProcess() as doomed:
        source.begin()
        for seed, guest in enumerate((one, two, doomed)):
            guest.ask("attach", receiver.attach)
            guest.say("visit_all", seed, threads=3)
        for _ in range(30):
            block, page = source.request()
            source.send_pages(block, [page])
        assert one.silent() and two.silent() and doomed.silent()
        os.kill(doomed.pid, signal.SIGKILL)
        wait_until(lambda: guests(receiver) == 2, "the receiver to forget it", WAIT_S)
        source.end()
        assert one.answer() == two.answer() == []
        assert one.ask("wait") is two.ask("wait") is True
        receiver.finish()


def test_a_guest_leaves_and_comes_back(receiver, source):
    """It keeps a copy of each userfaultfd while it is attached, gives them up when it detaches, and
    gets a fresh, right view when it attaches again."""
    with GuestProcess() as guest:
        source.begin()
        guest.ask("attach", receiver.attach)
        assert guest.ask("userfaultfds") == SHARDS
        source.send_pages(0, MISSING[:20])
        assert guest.ask("visit", 0, MISSING[:20]) is None
        assert guest.ask("userfaultfds") == SHARDS
        guest.ask("close")
        assert guest.ask("userfaultfds") == 0
        wait_until(lambda: guests(receiver) == 0, "the receiver to forget it", WAIT_S)
        source.send_pages(0, MISSING[20:40])
        assert guest.ask("attach", receiver.attach)["number"] is not None
        assert guest.ask("visit", 0, MISSING[:40]) is None
        guest.say("visit_all")
        source.end()
        assert guest.answer() == []
        receiver.finish()


def vm_flags(pid: int, block: str) -> set[str]:
    """The kernel's flags of a process's mapping of a block (proc(5), smaps)."""
    _, _, rest = Path(f"/proc/{pid}/smaps").read_text().partition(f".{block}\n")
    return set(rest.partition("VmFlags:")[2].partition("\n")[0].split())


def test_a_child_of_a_guest_reads_no_zeros(receiver, source):
    """A child has no userfaultfd; it has the memory when all is here, and not before."""
    first = ORACLE.page(0, MISSING[0], ORACLE.final(0)[MISSING[0]])[0]
    with GuestProcess() as guest:
        source.begin()
        guest.ask("attach", receiver.attach)
        assert guest.ask("child_reads", 0, MISSING[0]) == -signal.SIGSEGV
        # Until Linux 6.4 khugepaged would fill holes that wait for a page.
        copy = receiver.coordinator.memory.placement is Placement.COPY
        assert {"dc", "nh"} & vm_flags(guest.pid, BLOCKS[0].name) == (
            {"dc", "nh"} if copy else {"dc"}
        )
        source.end()
        guest.ask("wait")
        assert not {"dc", "nh"} & vm_flags(guest.pid, BLOCKS[0].name)
        assert guest.ask("child_reads", 0, MISSING[0]) == first
        receiver.finish()


def test_the_ninth_guest_is_refused_until_one_leaves(receiver, source):
    source.begin()
    with contextlib.ExitStack() as stack:

        def attach() -> sharded_pc.Guest:
            return stack.enter_context(sharded_pc.attach(receiver.attach, timeout=WAIT_S))

        eight = [attach() for _ in range(8)]
        assert sorted(guest.number for guest in eight) == list(range(8))
        with pytest.raises(AttachError, match="8 guests are attached already; close one first"):
            attach()
        eight[5].close()
        wait_until(lambda: guests(receiver) == 7, "the receiver to forget it", WAIT_S)
        assert attach().number == 5
        source.end()
        receiver.finish()


# --- after the end, by name ---


@pytest.fixture
def kept(tmp_path: Path, unique_name: str) -> Iterator[str]:
    """The name of a receiver that has completed and left its RAM."""
    with (
        Receiving(tmp_path, unique_name, workers=1, keep=True) as receiver,
        open_source(receiver.sock) as source,
    ):
        source.begin()
        with pytest.raises(AttachError, match=f"{unique_name!r} is still receiving: attach to its"):
            sharded_pc.attach(unique_name)
        source.end()
        receiver.finish()
    yield unique_name
    for found in shm.receivers():
        if found.name == unique_name:
            shm.remove(found)


def test_kept_ram_by_name_is_memory_to_slice(kept):
    """`sharded_pc.attach(NAME)`: writable memoryviews of every block, right to the last byte,
    nothing registered; close() refuses while a slice of it is in use."""
    with sharded_pc.attach(kept) as guest:
        assert guest.completed and guest.number is None
        guest.wait()
        assert {name: len(view) for name, view in guest.blocks.items()} == {
            block.name: block.size for block in BLOCKS
        }
        for index, block in enumerate(BLOCKS):
            view = guest.blocks[block.name]
            assert isinstance(view, memoryview) and not view.readonly
            assert ORACLE.first_wrong(index, view, ORACLE.final(index)) is None
        page = guest.blocks["pc.ram"][4096:8192]
        assert bytes(page) == ORACLE.page(0, 1, ORACLE.final(0)[1])
        page[:5] = b"guest"
        assert bytes(guest.blocks["pc.ram"][4096:4101]) == b"guest"
        with pytest.raises(TypeError):
            guest.blocks["pc.ram"] = page
        page.release()


def test_kept_ram_as_numpy_arrays(kept):
    numpy = pytest.importorskip("numpy", reason="needs NumPy: pip install numpy")
    with sharded_pc.attach(kept) as guest:
        words = numpy.frombuffer(guest.blocks["pc.ram"], dtype=numpy.uint64)
        page = words.reshape(-1, 512)[3]
        assert page.tobytes() == ORACLE.page(0, 3, ORACLE.final(0)[3])
        with pytest.raises(BufferError):
            guest.close()
        del words, page


# --- nobody to attach to ---


def test_attach_where_no_receiver_is(tmp_path, unique_name):
    """A path without a socket, a socket whose receiver is dead, a name nobody has, a bad name."""
    stale = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(stale)
    for target in (tmp_path / "none", stale, unique_name):
        with pytest.raises(FileNotFoundError) as caught:
            sharded_pc.attach(target)
        assert str(target) in str(caught.value)
    with pytest.raises(sharded_pc.ShardedPcError, match="receiver name"):
        sharded_pc.attach("a b")


def test_attach_gives_up_after_its_timeout(receiver, source):
    """Before the geometry is known the answer does not come; later READY does not."""
    with pytest.raises(TimeoutError):
        sharded_pc.attach(receiver.attach, timeout=0.1)
    source.set_up()
    with pytest.raises(TimeoutError):
        sharded_pc.attach(receiver.attach, timeout=0.5)
    with sharded_pc.attach(receiver.attach, timeout=WAIT_S, wait_ready=False) as guest:
        with pytest.raises(TimeoutError):
            guest.wait(0.1)
        receiver.quit()
        with pytest.raises(AttachError, match="the migration failed: ended on request"):
            guest.wait(WAIT_S)


# --- bad clients ---


def refusals(receiver: Receiving, table: Table) -> dict[str, str | None]:
    """What clients were told, where that is not the one clear error it should be."""
    wrong = {}
    for name, (speak, expected) in table.items():
        with Client(receiver.attach) as client:
            speak(client)
            told = client.error()
            if not re.search(expected, told or ""):
                wrong[name] = told
    return wrong


def leave_in_each_step(receiver: Receiving, *, geometry: bool) -> None:
    """Clients that go away without a word."""
    steps = [lambda c: None, SILENCES["half a greeting"], greeting(protocol.attach())]
    if geometry:
        steps += [Client.geometry, SILENCES["half a hand-over"]]
        steps += [address(), descriptors(Client.uffds), descriptors(lambda c: [])]
    for step in steps:
        with Client(receiver.attach) as client:
            step(client)


def descriptor_counts(receiver: Receiving) -> list[int]:
    pids = [os.getpid(), *receiver.worker_pids()]
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]


def annoy(receiver: Receiving, *, geometry: bool = True) -> None:
    """All bad clients; the receiver keeps none of their descriptors."""
    shards = receiver.coordinator.shards
    count = len(receiver.worker_pids())
    wait_until(lambda: len(shards.spare_pids) == count, "the spare workers", WAIT_S)
    before, attached = descriptor_counts(receiver), guests(receiver)
    assert refusals(receiver, GREETINGS) == {}
    if geometry:
        assert refusals(receiver, HANDOVERS) == {}
    leave_in_each_step(receiver, geometry=geometry)
    wait_until(lambda: descriptor_counts(receiver) == before, f"{before} descriptors", WAIT_S)
    assert guests(receiver) == attached


def test_bad_clients_get_an_error_and_nobody_else_notices(receiver, source, caplog):
    """Before the geometry, in precopy and in postcopy, with a good guest beside them."""
    with GuestProcess() as good, GuestProcess() as later:
        annoy(receiver, geometry=False)
        good.say("attach", receiver.attach)
        source.set_up()
        wait_until(lambda: guests(receiver) == 1, "the good guest", WAIT_S)
        annoy(receiver)
        source.precopy()
        source.switch()
        good.answer()
        good.say("visit_all")
        source.request()
        annoy(receiver)
        later.ask("attach", receiver.attach)
        later.say("visit_all")
        source.end()
        assert good.answer() == later.answer() == []
        receiver.finish()
    assert {record.levelname for record in caplog.records} == {"WARNING"}, caplog.text


def test_silent_clients_are_sent_away(tmp_path, unique_name):
    """Whatever step a client falls silent in, it is told and dropped."""
    with (
        Receiving(tmp_path, unique_name, workers=SHARDS, attach_step_seconds=0.2) as receiver,
        open_source(receiver.sock) as source,
    ):
        source.set_up()
        said = "the client said nothing for 0.2 s in the middle of the hand-over"
        assert refusals(receiver, {k: (speak, said) for k, speak in SILENCES.items()}) == {}
        source.precopy()
        source.switch()
        source.end()
        receiver.finish()


def same_twice(client: Client) -> None:
    descriptors(lambda c: c.uffds(1) * SHARDS)(client)


def test_odd_guests_harm_nobody(receiver, source):
    """A guest that maps nothing, one that hands the same userfaultfd over twice and one that has
    registered nothing itself are guests that never fault; the others do not notice."""
    with GuestProcess() as good, contextlib.ExitStack() as stack:
        source.begin()
        good.ask("attach", receiver.attach)
        odd = (address(), same_twice, descriptors(Client.uffds))
        clients = [stack.enter_context(Client(receiver.attach)) for _ in odd]
        for client, speak in zip(clients, odd, strict=True):
            speak(client)
            assert "attached" in client.answer()
            assert client.answer() == protocol.event("READY")
        good.say("visit_all")
        source.end()
        assert good.answer() == []
        assert [client.answer() for client in clients] == [protocol.event("COMPLETED")] * 3
        receiver.finish()


def test_an_unserviceable_guest_is_told_and_dropped(receiver, source):
    """A userfaultfd that cannot be read: found out when faults are to be answered."""
    with Client(receiver.attach) as client:
        source.begin()
        client.geometry()
        client.hand_over({}, without_handshake(client))
        assert "attached" in client.answer()
        told = [message for message in iter(client.answer, None) if "error" in message]
        assert re.search("shard .: fault of guest 0 .*: Invalid argument", str(told[0]))
        wait_until(lambda: guests(receiver) == 0, "the receiver to forget it", WAIT_S)
        source.end()
        receiver.finish()
