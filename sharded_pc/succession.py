"""Taking a dead receiver's place: its memory, and nobody else at work on it.

What its coordinator and workers knew is in shared memory, or with its guests, who attach again.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterable
from pathlib import Path

from sharded_pc import shm
from sharded_pc.errors import HostError, UsageError
from sharded_pc.memory import GuestMemory
from sharded_pc.native.control import Control
from sharded_pc.shm import Segment
from sharded_pc.state import MigrationStatus, PostcopyState

END_SECONDS = 5.0
"""For a killed worker to be gone."""
_OVER = (MigrationStatus.COMPLETED, MigrationStatus.FAILED, MigrationStatus.CANCELLED)


class NothingToResume(UsageError):
    """No receiver of this name died while its guest ran."""


def is_resumable(control: Control) -> bool:
    """Its guest has run, so that nobody but its source and this memory have all of its pages."""
    ran = control.postcopy_state in (PostcopyState.RUNNING, PostcopyState.END)
    return ran and control.status not in _OVER


def take_over(name: str) -> tuple[GuestMemory, frozenset[int]]:
    """The memory of receiver `name`, whose owner we are now, and the processes that were its
    guests; NothingToResume, HostError."""
    try:
        memory = GuestMemory.adopt(shm.check_name(name))
    except FileNotFoundError:
        raise NothingToResume(f"there is no receiver {name!r} to resume") from None
    except HostError as error:
        raise HostError(f"receiver {name!r} cannot be resumed, it may be alive: {error}") from None
    try:
        _check(memory)
        end_workers(memory)
        guests = memory.control.guest_pids
        memory.control.take_over(os.getpid())
    except BaseException:
        memory.close()
        raise
    return memory, guests


def looks_resumable(name: str) -> bool:
    """Of a receiver that is dead, at this moment."""
    try:
        segment = Segment.open(f"/{name}{shm.CONTROL}")
    except (FileNotFoundError, PermissionError):
        return False
    try:
        control = Control(segment.map)
        try:
            return control.is_valid() and is_resumable(control)
        finally:
            control.release()
    finally:
        segment.close()


def _check(memory: GuestMemory) -> None:
    control = memory.control
    if control.status is MigrationStatus.COMPLETED:
        raise NothingToResume(
            f"receiver {memory.name!r} has nothing to resume: its migration has completed, and its "
            f"guest{_qemu(control)} goes on without it; `sharded-pc clean` removes what is left "
            f"here"
        )
    if not is_resumable(control):
        raise NothingToResume(
            f"receiver {memory.name!r} cannot be resumed: its guest did not run here (postcopy "
            f"state {control.postcopy_state.name}, status {control.status.value}); the source goes "
            f"on with it, `sharded-pc clean` removes what is left here"
        )


def _qemu(control: Control) -> str:
    known = control.destination
    return "" if known is None else f" in QEMU (pid {known[0]}), unless that has ended,"


def end_workers(memory: GuestMemory) -> None:
    """They end by themselves when their coordinator dies, but nobody may wait for that: two
    processes would place the same pages.  HostError."""
    pids = {shard.pid for shard in memory.control.shards()}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _end(pid, f"{shm.ROOT}/{memory.name}{shm.CONTROL}")


def _end(pid: int, control: str) -> None:
    """Kills a process if it has the segment mapped: another may have got the number."""
    pidfd = os.pidfd_open(pid)
    try:
        if control not in _mapped_files(pid):
            return
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(END_SECONDS * 1000):
            raise HostError(f"worker {pid} of the dead receiver does not end: it is still at work")
    except PermissionError:
        raise HostError(f"worker {pid} of the dead receiver may not be killed by us") from None
    finally:
        os.close(pidfd)


def _mapped_files(pid: int) -> Iterable[str]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return ()
    return {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
