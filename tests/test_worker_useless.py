"""Workers that live and are of no use, and that die again and again."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import threading
from collections.abc import Callable

import pytest

from sharded_pc.errors import ShardError
from sharded_pc.geometry import PAGE_BYTES, Geometry, Placement
from sharded_pc.memory import GuestMemory
from sharded_pc.native.guests import Guests
from sharded_pc.shards import Shards, shard, watch
from sharded_pc.testing.oracle import DIRTIED
from tests.guest_process import GuestProcess
from tests.synthetic import (
    BLOCKS,
    ORACLE,
    STRIPE_BYTES,
    WAIT_S,
    Background,
    Receiving,
    open_source,
)
from tests.test_recovery import migrating, recovered
from tests.workers import (
    MISSING,
    PAGE,
    STRIPE_PAGES,
    begin,
    bit,
    complete,
    kill,
    restarts_of,
    wait_restarts,
)

pytestmark = [pytest.mark.uffd, pytest.mark.usefixtures("placement")]

# --- workers that live and are of no use ---


@pytest.mark.usefixtures("blind")
def test_a_page_that_cannot_be_placed(tmp_path, unique_name, placement):
    """A worker that is broken is replaced, and its successor tries again."""
    if placement is not Placement.COPY:
        pytest.skip("n/a: with continue workers place nothing")
    page = next(p for p in MISSING if p >= STRIPE_PAGES and ORACLE.final(0)[p] == DIRTIED)
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        begin(receiver, source, guest)
        memory = receiver.coordinator.memory
        os.pwrite(memory.blocks[0].fd, b"stale" * 100, page * PAGE_BYTES)
        memory.written.set(bit(receiver, page), 1)  # as a punch would that left it there
        resource.prlimit(receiver.worker_pids()[1], resource.RLIMIT_FSIZE, (0, 0))
        source.send_pages(0, [page])
        wait_restarts(receiver, 1)
        complete(receiver, source, guest)
    assert restarts_of(receiver) == [0, 1]


PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000


class Held:
    """A thread that goes on no more, in a process that is not stopped.  The one who holds it has to
    look after its end, too."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self.holds = threading.Event()
        self._life = Background(self._hold)

    def _hold(self) -> None:
        ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
            assert ptrace(request, self._thread, 0, 0) == 0, os.strerror(ctypes.get_errno())
        os.waitpid(self._thread, WALL)
        self.holds.set()
        with contextlib.suppress(ChildProcessError):
            while os.WIFSTOPPED(os.waitpid(self._thread, WALL)[1]):
                pass

    def end(self) -> None:
        self._life.result()


def placement_thread(pid: int) -> int:
    """The first one that is started."""
    return sorted(int(tid) for tid in os.listdir(f"/proc/{pid}/task"))[1]


def test_a_hang(tmp_path, unique_name, caplog):
    """Its placement loop stands still while the process looks well: in the time that a guest may
    wait, in looks that were made."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        begin(receiver, source, guest)
        held = Held(placement_thread(receiver.worker_pids()[1]))
        assert held.holds.wait(WAIT_S)
        wait_restarts(receiver, 1)
        held.end()
        complete(receiver, source, guest)
    assert "it hung, no sign of life for 0.2 s" in caplog.text


class Looked:
    """What Watch sees of a process, and of its placement loop."""

    def __init__(self, *, stopped: bool = False, asleep: bool = True) -> None:
        self.index, self.placing, self.stopped, self.asleep = 0, 1, stopped, asleep
        self.reason = ""
        self.count, self.nudged = 0, 0
        self.on_question: Callable[[], None] = lambda: None

    def is_stopped(self) -> bool:
        return self.stopped

    def sleeps(self) -> bool:
        self.on_question()
        return self.asleep

    def kill(self, reason: str) -> None:
        self.reason = self.reason or reason

    def beats(self, index: int) -> int:
        return self.count

    def nudge(self, index: int) -> None:
        self.nudged += 1


def looked_at(process: Looked, seconds: float, beats: int = 0) -> Looked:
    """Has beaten first."""
    watching = watch.Watch(lambda: [process], process)
    watching.look(late=0.0)
    process.count += 1
    for _ in range(round(seconds / watch.LOOK_SECONDS) + 1):
        watching.look(late=0.0)
        process.count += beats
    return process


def test_who_is_late_himself_blames_nobody():
    """A coordinator that was stopped, or did not get the processor, has not looked meanwhile."""
    silent, stopped = Looked(), Looked(stopped=True)
    watching = watch.Watch(lambda: [silent, stopped], silent)
    watching.look(late=30.0)
    silent.count = 1
    watching.look(late=30.0)
    assert (silent.reason, stopped.reason) == ("", "")
    watching.look(late=0.1)
    assert "SIGSTOP" in stopped.reason and not silent.reason
    for _ in range(4):
        watching.look(late=0.0)
    assert "hung" in silent.reason


def test_a_beat_is_a_sign_of_life():
    assert not looked_at(Looked(), 5 * watch.BUSY_SECONDS, beats=1).reason


def test_who_sleeps_on_when_woken_hangs():
    """Noticed in time: a guest must not wait for more than 0.3 s."""
    assert not looked_at(Looked(), watch.NUDGE_SECONDS).reason
    hung = looked_at(Looked(), watch.HANG_SECONDS)
    assert hung.nudged == 1 and hung.reason == "it hung, no sign of life for 0.2 s"


def test_who_went_on_while_we_asked_does_not_hang():
    """A watcher that lacks the processor between its questions blames nobody."""
    process = Looked()

    def go_on() -> None:
        process.count += 1

    process.on_question = go_on
    assert not looked_at(process, watch.BUSY_SECONDS).reason


def test_who_wants_to_run_is_given_time():
    """It lacks the processor, or is at work in the kernel."""
    assert not looked_at(Looked(asleep=False), watch.BUSY_SECONDS - watch.LOOK_SECONDS).reason
    assert looked_at(Looked(asleep=False), watch.BUSY_SECONDS).reason


def test_who_has_never_beaten_is_given_time():
    new = Looked()
    watching = watch.Watch(lambda: [new], new)
    for _ in range(round(watch.HANG_SECONDS / watch.LOOK_SECONDS) * 2):
        watching.look(late=0.0)
    assert not new.reason


# --- those that die again and again ---


def wear_out(receiver: Receiving) -> str:
    """Five deaths in ten seconds; what is said of them."""
    for _ in range(shard.DEATHS_MOST - 1):
        kill(receiver)
    pid = receiver.worker_pids()[1]
    os.kill(pid, signal.SIGKILL)
    last = f"the worker of shard 1 (pid {pid}) died, killed by signal 9"
    return f"shard 1 lost 5 workers within 10 s: {last}"


def test_five_deaths_before_the_guest_runs(tmp_path, unique_name):
    with Receiving(tmp_path, unique_name) as receiver, open_source(receiver.sock) as source:
        source.set_up()
        source.precopy()
        expected = wear_out(receiver)
        with pytest.raises(ShardError) as caught:
            receiver.finish()
    assert str(caught.value) == expected


def test_five_deaths_pause_and_a_recovery_goes_on(tmp_path, unique_name):
    """Somebody has to look at it; the guest waits meanwhile, and nothing is lost."""
    with (
        migrating(tmp_path, unique_name) as (receiver, source, control),
        GuestProcess() as guest,
    ):
        guest.ask("attach", receiver.attach)
        source.send_pages(0, MISSING[:50])
        expected = wear_out(receiver)
        assert control.wait_status("postcopy-paused")["error-desc"] == expected
        guest.say("visit", 0, [PAGE])
        with recovered(source, control, f"unix:{tmp_path / 'again'}"):
            info = complete(receiver, source, guest, waiting=True)
    assert info["sharded"]["shards"][1]["restarts"] == shard.DEATHS_MOST


class Troubled:
    """Shards without a coordinator."""

    def __init__(self, name: str, count: int = 2) -> None:
        self.memory = GuestMemory.create(name, count)
        self.memory.define(Geometry.of(BLOCKS, count, STRIPE_BYTES), Placement.COPY)
        self.trouble: list[ShardError] = []

    async def __aenter__(self) -> Troubled:
        self.guests = Guests(self.memory.control)
        self.shards = Shards(self.memory, 2, self.guests)
        self.shards.on_trouble = self.trouble.append
        await self.shards.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shards.stop()
        self.guests.close()
        self.memory.unlink()
        self.memory.close()

    async def until(self, ready: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not ready():
                await asyncio.sleep(0.001)

    def restarts(self) -> int:
        return self.memory.control.shard(1).restarts

    async def wear_out(self) -> None:
        for n in range(shard.DEATHS_MOST):
            await self.until(lambda n=n: self.restarts() == n)
            os.kill(self.shards.pids()[1], signal.SIGKILL)
        await self.until(lambda: bool(self.trouble))


def test_given_up_and_revived(unique_name):
    """Whoever tells a shard that was given up hears why; a recovery begins with a new worker, which
    knows what all were told."""

    async def main() -> None:
        async with Troubled(unique_name) as troubled:
            shards, control = troubled.shards, troubled.memory.control
            await shards.tell("geometry")
            await troubled.wear_out()
            assert control.shard(1).failed and not control.shard(0).failed
            with pytest.raises(ShardError, match="shard 1 lost 5 workers"):
                await shards.tell("prepare")
            shards.revive()
            await shards.tell("listen")
            beats = control.beats(1)
            await troubled.until(lambda: control.beats(1) > beats)
            assert not control.shard(1).failed

    asyncio.run(main())


def test_no_process_can_be_started(unique_name):
    """Neither a worker nor a spare: the shard is given up, and revived when there is room."""

    async def main() -> None:
        async with Troubled(unique_name) as troubled:
            shards = troubled.shards
            most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), most[1]))
            os.kill(shards.pids()[1], signal.SIGKILL)
            shards.keep_spares()
            await troubled.until(lambda: bool(troubled.trouble))
            resource.setrlimit(resource.RLIMIT_NOFILE, most)
            assert str(troubled.trouble[0]) == "start a worker for shard 1: Too many open files"
            assert shards.spare_pids == []
            shards.revive()
            await shards.tell("geometry")
            assert troubled.restarts() == 1

    asyncio.run(main())
