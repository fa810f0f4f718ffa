"""Design §7: what holds whatever happens, each with a test that fails when it is broken.

1 no byte that the source did not have there · 2 placed once · 3 fail-stop · 7 no input does harm
(test_bad_input.py has the stream's half) · 8 nothing is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys

import pytest

from sharded_pc.errors import Cancelled
from sharded_pc.observe.view import ReceiverView
from sharded_pc.testing.oracle import DIRTIED, GUEST
from tests.guest_process import Counters, GuestFailed, GuestProcess, waits_for_page
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
ZEROS = missing_pages(ORACLE, 0, 0)
TOTAL = sum(block.pages for block in BLOCKS)


# --- 1: a guest never reads a byte that the source did not have there ---


@pytest.mark.parametrize("bandwidth", [None, 8 << 20], ids=["a flood", "mostly requests"])
def test_hammered_pages_are_whole_and_right(tmp_path, unique_name, bandwidth):
    """Invariant 1: twelve threads of three guests touch all pages, each in its own order, while
    batches, single pages, zero pages and requested pages arrive: every word of every page is the
    last version's at first sight (an old one was precopied and discarded), and after the end."""
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(Receiving(tmp_path, unique_name))
        guests = [stack.enter_context(GuestProcess()) for _ in range(3)]
        source = stack.enter_context(open_source(receiver.sock, bandwidth=bandwidth))
        source.begin()
        for seed, guest in enumerate(guests):
            guest.ask("attach", receiver.attach)
            guest.say("visit_all", seed, threads=4)
        # All of them are at it, else a flood is over before they begin.
        wait_until(lambda: len(source.back.requests) >= 4 * len(guests), "requests", WAIT_S)
        Background(source.end).result()
        assert [guest.answer() for guest in guests] == [[], [], []]
        info = receiver.finish()
        assert [guest.ask("visit_all", 7) for guest in guests] == [[], [], []]
    assert [block["received-pages"] for block in info["blocks"]] == [b.pages for b in BLOCKS]
    assert sum(shard["faults"] for shard in info["sharded"]["shards"]) > 100


def test_requested_pages_race_with_the_background(tmp_path, unique_name):
    """Invariant 1: pages that guests wait for come as a request's answer and again, in the middle
    of a batch, in the same burst; data and zero pages alike."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as one,
        GuestProcess() as two,
        open_source(receiver.sock) as source,
    ):
        source.begin()
        for guest in (one, two):
            guest.ask("attach", receiver.attach)
        for first in range(0, 300, 20):
            wanted = MISSING[first : first + 20]
            for guest in (one, two):
                guest.say("visit", 0, wanted[7:9])
            while source.request() != (0, wanted[7]):
                pass  # an older one, whose page came unasked
            source.send_pages(0, [wanted[7]])
            source.again(0, wanted)
            source.again(0, [wanted[8]])
            assert (one.answer(), two.answer()) == (None, None)
        source.end()
        info = receiver.finish()
        assert one.ask("visit_all") == two.ask("visit_all") == []
    assert sum(shard["second-pages"] for shard in info["sharded"]["shards"]) >= 15


# --- 2: between two discards of it a page is placed once ---


def test_a_second_arrival_changes_nothing(tmp_path, unique_name):
    """Invariant 2: a page that arrives a second time, with other content, alters neither what was
    placed nor what the guest has written since: data over data, data over zeros, zeros over data;
    pages that a guest has touched and pages that none has."""
    data, zeros = DATA[:8], ZEROS[:8]
    final = ORACLE.final(0)
    stale = bytes(77 if final[page] == 0 else 0 for page in range(BLOCKS[0].pages))
    other = bytes([78]) * BLOCKS[0].pages
    written = bytes([GUEST]) * BLOCKS[0].pages
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        source.begin()
        guest.ask("attach", receiver.attach)
        source.send_pages(0, data + zeros)
        assert guest.ask("visit", 0, data[:4] + zeros[:4], None, written) is None
        for versions in (stale, other):
            source.again(0, data + zeros, versions)
        source.end()
        info = receiver.finish()
        assert guest.ask("visit", 0, data[:4] + zeros[:4], written) is None
        assert guest.ask("visit", 0, data[4:] + zeros[4:]) is None
    assert sum(shard["second-pages"] for shard in info["sharded"]["shards"]) == 32


def test_in_precopy_the_last_arrival_holds(tmp_path, unique_name):
    """Invariant 2, its other side: before LISTENING a page may come often, as data and as zeros,
    and the last one stays if it is not discarded."""
    settled = [n for n, (a, b) in enumerate(zip(ORACLE.precopied(0), ORACLE.final(0), strict=True))
               if a == b]  # fmt: skip
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        source.set_up()
        for version in (9, 0, 8):
            source.again(0, settled, bytes([version]) * BLOCKS[0].pages)
        source.precopy()
        source.switch()
        guest.ask("attach", receiver.attach)
        assert guest.ask("visit", 0, [p for p in settled if ORACLE.final(0)[p]]) is None
        source.end()
        receiver.finish()
        assert guest.ask("visit_all") == []


# --- 3: fail-stop ---


def killed(receiver: Receiver) -> None:
    """SIGKILL for the coordinator and all workers."""
    with ReceiverView(receiver.name) as view:
        workers = [shard["pid"] for shard in view.info()["sharded"]["shards"]]
    for pid in [receiver.pid, *workers]:
        os.kill(pid, signal.SIGKILL)


def begun(source: StepSource, arrived: list[int]) -> None:
    source.begin()
    source.wait_switched()
    source.send_pages(0, arrived)


def test_after_a_kill_missing_pages_wait_and_never_read_as_zeros(tmp_path, unique_name):
    """Invariants 1 and 3: kill -9 of coordinator and workers in the middle of postcopy.  The thread
    that waits for a page goes on waiting; a second guest's first access to another missing page,
    after the kill, waits too; pages that are here can be touched by all."""
    arrived, missing = DATA[:64], [DATA[70], DATA[-1]]  # of shard 0, of shard 1
    counters = Counters(tmp_path / "counters")
    receiver = Receiver(tmp_path, unique_name, keep=False)
    with receiver, GuestProcess() as guest, GuestProcess() as late:
        with open_source(connect(receiver.uri())) as source:
            begun(source, arrived)
            for each in (guest, late):
                each.ask("attach", str(receiver.attach_path))
            path = str(tmp_path / "counters")
            thread = guest.ask("keep_touching", path, (0, missing[0]), 0, arrived[:32])
            assert source.request() == (0, missing[0])
            killed(receiver)
            wait_until(lambda: not receiver.processes(), "the end of all processes", WAIT_S)
        late.say("visit", 0, [missing[1]])
        seen = counters["visits"]
        wait_until(lambda: counters["visits"] > seen + 2000, "more visits", WAIT_S)
        assert guest.ask("visit", 0, arrived[32:]) is None, "pages that are here"
        assert (counters["arrived"], counters["wrong"]) == (0, 0)
        wait_until(lambda: waits_for_page(guest.pid, thread), "the thread to sleep", WAIT_S)
        wait_until(lambda: waits_for_page(late.pid, late.pid), "the late guest to sleep", WAIT_S)
        assert late.silent(), "it must not have seen a page that never came"


def test_a_guest_is_told_that_its_missing_pages_will_not_come(tmp_path, unique_name):
    """Invariant 3, handled: the receiver says FAILED, and waits stay waits."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as waiting,
        GuestProcess() as asking,
        open_source(receiver.sock) as source,
    ):
        begun(source, [])
        for guest in (waiting, asking):
            guest.ask("attach", receiver.attach)
        waiting.say("visit", 0, DATA[:1])
        assert source.request() == (0, DATA[0])
        asking.say("wait")
        receiver.quit()
        with pytest.raises(GuestFailed, match="migration failed: ended on request") as at:
            asking.answer()
        assert at.value.kind == "AttachError"
        with pytest.raises(Cancelled):
            receiver.finish()
        wait_until(lambda: waits_for_page(waiting.pid, waiting.pid), "the guest to sleep", WAIT_S)
        assert waiting.silent()


# --- 7: no input does harm: the control socket ---

JUNK = (
    b"\0\xff" * 50,
    b"}",
    b"[1, 2",
    b'"' + b"x" * (1 << 20),
    b"[" * 60_000,
    b"9" * 70_000,
    b'{"execute": 1}{"execute": null}[]{}1 "x" true',
    b'{"execute": "quit", "arguments": ',
    b'{"execute": "query-migrate"}{"execute": "migrate", "id": {"a": [1e400]}}',
    b'{"execute": "qmp_capabilities"}' * 40,
    b'{"execute": "\\ud800"}',
)


def control(path: str) -> tuple[socket.socket, object]:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT_S)
    sock.connect(path)
    file = sock.makefile("r", encoding="utf-8")
    assert "QMP" in json.loads(file.readline())
    return sock, file


def test_junk_on_the_control_socket_does_no_harm(tmp_path, unique_name):
    """Invariant 7: whatever comes on the control socket, in whatever pieces, is answered with
    errors or closed; the migration goes on and a well-behaved client is served."""
    path = str(tmp_path / "control")
    dice = random.Random(3)
    junk = [*JUNK, *(bytes(dice.choices(b'{}[]":,0 aexcut\\u', k=200)) for _ in range(40))]
    with (
        Receiving(tmp_path, unique_name, workers=1, control=path) as receiver,
        open_source(receiver.sock) as source,
    ):
        good, answers = control(path)
        good.sendall(b'{"execute": "qmp_capabilities"}')
        assert json.loads(answers.readline()) == {"return": {}}
        for raw in junk:
            sock, file = control(path)
            with sock, file, contextlib.suppress(ConnectionError):
                sock.sendall(raw)
                sock.shutdown(socket.SHUT_WR)
                for line in file:
                    assert "error" in (reply := json.loads(line)) or reply == {"return": {}}, raw
        source.migrate()
        lines = iter(lambda: json.loads(answers.readline()), None)
        next(line for line in lines if line.get("data") == {"status": "completed"})
        good.sendall(b'{"execute": "query-migrate", "id": 1}')
        answer = next(line for line in lines if "event" not in line)
        good.close()
        answers.close()
        assert answer["id"] == 1 and answer["return"]["status"] == "completed"
        receiver.finish()


# --- 8: nothing is left behind ---


def sharded_pc(*arguments: str) -> str:
    command = [sys.executable, "-m", "sharded_pc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_clean_removes_the_dead_one_and_not_the_live_one(tmp_path, new_name):
    """Invariant 8: after kill -9 of a whole receiver `clean` finds exactly what that one left;
    one that lives at the same time goes on and completes; a taken name is refused."""
    dead, live = new_name(), new_name()
    with Receiver(tmp_path, dead, keep=False) as first, Receiving(tmp_path, live) as second:
        with open_source(connect(first.uri())) as source, open_source(second.sock) as other:
            for each in (source, other):
                begun(each, DATA[:8])
            killed(first)
            wait_until(lambda: not first.processes(), "the end of all processes", WAIT_S)
            assert len(first.segments()) == 5
            assert f"{dead}: 5 files, " in sharded_pc("clean", "--list", "--name", dead)
            assert first.segments(), "--list removes nothing"
            said = sharded_pc("clean", "--resumable", "--name", dead)
            said += sharded_pc("clean", "--resumable", "--name", live)
            assert [line.rpartition(", ")[2] for line in said.splitlines()] == ["removed", "alive"]
            assert first.segments() == []
            check_taken(live)
            other.end()
        assert second.finish()["status"] == "completed"


def check_taken(name: str) -> None:
    """A second receiver of the name is refused before it has touched anything."""
    command = [sys.executable, "-m", "sharded_pc", "receive", "exec:true", "--name", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"sharded-pc: shared memory /{name}%control exists already; choose another --name, or "
        "remove a dead receiver's with `sharded-pc clean`\n"
    )
