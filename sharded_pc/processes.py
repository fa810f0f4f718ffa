"""Child processes: spawned, with a pipe, deaf to ^C and its like (their parent hears them), and
killed by the kernel when the thread that started them dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from importlib import resources
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

CHILD = "SHARDED_PC_CHILD"
GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes started within never hear ^C, nor what else is sent to a whole process group (by
    timeout(1), systemd, a closing terminal): it is their parent's to end them in order."""
    resource_tracker.ensure_running()  # its first start, inside start(), would unblock ^C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _bound() -> Iterator[None]:
    """Processes started within die with us from their first instruction on (native/child/main.c):
    Python takes long to start, and one that is stopped meanwhile would stay."""
    child = str(resources.files("sharded_pc.native").joinpath("sharded-pc-child"))
    python = multiprocessing.spawn.get_executable()
    os.environ[CHILD] = f"{os.getpid()}:{os.fsdecode(python)}"
    multiprocessing.set_executable(child)
    try:
        yield
    finally:
        multiprocessing.set_executable(python)
        del os.environ[CHILD]


def is_alive(pid: int) -> bool:
    """A process, not a zombie, has this number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def thread_state(pid: int, thread: int) -> str:
    """A letter of proc(5): R runs or wants to, D is at work in the kernel, S sleeps, t is held by a
    debugger; "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def start(
    target: Callable, *args: object, name: str, daemon: bool = False
) -> tuple[BaseProcess, Connection]:
    """Starts `target(conn, *args)` in a new process; returns it and our end of the pipe.

    Spawned, never forked: a fork would carry threads' locks and userfaultfds along.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=target, args=(theirs, *args), name=name, daemon=daemon)
    with _deaf(), _bound():
        process.start()
    theirs.close()
    return process, ours
