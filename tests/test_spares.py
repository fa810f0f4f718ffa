"""Processes that wait for the day a worker dies: one for each shard, ready, in nobody's way."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from sharded_pc.observe.view import ReceiverView
from sharded_pc.shards import roster
from tests.qemu import wait_until
from tests.receiver import Receiver
from tests.synthetic import WAIT_S
from tests.test_worker_useless import Troubled

pytestmark = pytest.mark.uffd

WORKERS = 3


def workers(receiver: Receiver) -> list[int]:
    with ReceiverView(receiver.name) as view:
        return [shard["pid"] for shard in view.info()["sharded"]["shards"]]


def spares(receiver: Receiver) -> set[int]:
    """All its processes but itself, its workers and multiprocessing's own."""
    others = set(receiver.processes()) - {receiver.pid, *workers(receiver)}
    return {pid for pid in others if b"spawn_main" in command_line(pid)}


def command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:  # it has ended
        return b""


def wait_spares(receiver: Receiver) -> set[int]:
    wait_until(lambda: len(spares(receiver)) == WORKERS, "a spare for each worker", WAIT_S)
    return spares(receiver)


def kill_all(pids: list[int]) -> None:
    """Returns when none of them lives."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def successors(troubled: Troubled) -> int:
    return sum(shard.restarts for shard in troubled.memory.control.shards())


def test_all_workers_at_once_twice(tmp_path, unique_name):
    """No successor is a process that had to be started, and all of them end with the receiver."""
    with Receiver(tmp_path, unique_name, None, "--workers", str(WORKERS)) as receiver:
        for _ in range(2):
            waiting, dying = wait_spares(receiver), workers(receiver)
            for pid in dying:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda d=dying: not {*d} & {*workers(receiver)}, "successors", WAIT_S)
            assert set(workers(receiver)) == waiting
        wait_spares(receiver)
        receiver.signal(signal.SIGTERM)
        receiver.finish()
        assert receiver.processes() == []


def test_spares_do_not_outlive_a_killed_receiver(tmp_path, unique_name):
    with Receiver(tmp_path, unique_name, None, "--workers", str(WORKERS)) as receiver:
        wait_spares(receiver)
        receiver.signal(signal.SIGKILL)
        wait_until(lambda: not receiver.processes(), "the end of all processes", WAIT_S)


def test_none_is_started_while_guests_wait(unique_name, monkeypatch):
    """The successors serve first; then their places are filled, one after the other."""
    monkeypatch.setattr(roster, "CALM_SECONDS", 0.0)
    started = []
    start = roster.Roster._start
    monkeypatch.setattr(roster.Roster, "_start", lambda s: started.append(1) or start(s))

    async def main() -> None:
        async with Troubled(unique_name) as troubled:
            shards, at_restart = troubled.shards, []
            assert len(started) == 2, "the start is not made slower"
            shards.keep_spares()
            await troubled.until(lambda: len(shards.spare_pids) == 2)
            shards.on_restart = lambda: at_restart.append(len(started))
            dying, waiting = shards.pids(), shards.spare_pids
            kill_all(dying)
            await troubled.until(lambda: len(at_restart) == 2)
            assert at_restart == [4, 4]
            assert set(shards.pids()) == set(waiting)
            await troubled.until(lambda: len(shards.spare_pids) == 2)
            assert len(started) == 6

    asyncio.run(main())


def test_a_spare_that_dies_is_replaced(unique_name, monkeypatch):
    monkeypatch.setattr(roster, "SPARE_AGAIN_SECONDS", 0.01)

    async def main() -> None:
        async with Troubled(unique_name) as troubled:
            shards = troubled.shards
            shards.keep_spares()
            await troubled.until(lambda: len(shards.spare_pids) == 2)
            gone, stays = shards.spare_pids
            os.kill(gone, signal.SIGKILL)
            await troubled.until(lambda: gone not in shards.spare_pids)
            await troubled.until(lambda: len(shards.spare_pids) == 2)
            assert stays in shards.spare_pids
            assert not troubled.trouble and troubled.restarts() == 0

    asyncio.run(main())


def test_no_more_than_the_host_is_asked_for(unique_name, monkeypatch):
    monkeypatch.setattr(roster, "SPARES_MOST", 1)
    monkeypatch.setattr(roster, "CALM_SECONDS", 0.0)

    async def main() -> None:
        async with Troubled(unique_name) as troubled:
            shards = troubled.shards
            shards.keep_spares()
            await troubled.until(lambda: len(shards.spare_pids) == 1)
            kill_all(shards.pids())
            await troubled.until(lambda: successors(troubled) == 2)
            await troubled.until(lambda: len(shards.spare_pids) == 1)
            (spare,) = shards.spare_pids
            kill_all(shards.pids())
            await troubled.until(lambda: spare in shards.pids())

    asyncio.run(main())
