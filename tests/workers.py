"""What tests of dying workers share: one is killed, its successor serves, everything is right."""

from __future__ import annotations

import os
import signal

from sharded_pc.geometry import PAGE_BYTES
from tests.guest_process import GuestProcess
from tests.qemu import wait_until
from tests.synthetic import (
    BLOCKS,
    ORACLE,
    STRIPE_BYTES,
    WAIT_S,
    Background,
    Receiving,
    StepSource,
    missing_pages,
)

MISSING = missing_pages(ORACLE, 0)
TOTAL = sum(block.pages for block in BLOCKS)
STRIPE_PAGES = STRIPE_BYTES // PAGE_BYTES
PAGE = next(page for page in MISSING if page >= STRIPE_PAGES)
"""A missing one of shard 1."""


def restarts(receiver: Receiving) -> list[int]:
    return [shard.restarts for shard in receiver.coordinator.memory.control.shards()]


def wait_restarts(receiver: Receiving, count: int) -> None:
    wait_until(lambda: sum(restarts(receiver)) >= count, f"{count} successors", WAIT_S)


def kill(receiver: Receiving, index: int = 1, signo: int = signal.SIGKILL) -> None:
    """Returns when the successor serves."""
    count = sum(restarts(receiver))
    os.kill(receiver.worker_pids()[index], signo)
    wait_restarts(receiver, count + 1)


def stop(pid: int) -> None:
    """Returns when it is stopped, which a signal is not at once."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def begin(receiver: Receiving, source: StepSource, *guests: GuestProcess) -> None:
    source.begin()
    source.wait_switched()
    for guest in guests:
        guest.ask("attach", receiver.attach)


def complete(
    receiver: Receiving, source: StepSource, *guests: GuestProcess, waiting: bool = False
) -> dict:
    """All pages come, and every guest finds them right: at once, if it was `waiting` for one."""
    Background(source.end).result()
    assert not waiting or [guest.answer() for guest in guests] == [None] * len(guests)
    info = receiver.finish()
    assert [guest.ask("visit_all") for guest in guests] == [[]] * len(guests)
    assert [block["received-pages"] for block in info["blocks"]] == [b.pages for b in BLOCKS]
    return info


def bit(receiver: Receiving, page: int, block: int = 0) -> int:
    return receiver.coordinator.memory.control.block(block)[2] + page


def restarts_of(receiver: Receiving) -> list[int]:
    return [shard["restarts"] for shard in receiver.finish()["sharded"]["shards"]]
