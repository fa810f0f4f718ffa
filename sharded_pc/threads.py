"""Threads of our own: one that cannot be started is this host's failure, and says what ran out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from sharded_pc.errors import HostError

REMEDY = "raise `ulimit -u`, the cgroup's pids.max, vm.max_map_count or `ulimit -v`"
"""clone(2)'s EAGAIN, and a stack that cannot be mapped: Python tells none from the other."""


def start(thread: threading.Thread) -> None:
    """HostError."""
    try:
        thread.start()
    except (RuntimeError, MemoryError):
        why = f"no more threads are to be had: {REMEDY}"
        raise HostError(f"start thread {thread.name!r}: {why}") from None


def run(work: Callable[[], None], name: str) -> Future:
    """`work` on a thread; its end, or what it raised.  HostError."""
    done: Future = Future()

    def main() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    done.set_running_or_notify_cancel()  # nobody's cancelling ends a thread
    start(threading.Thread(target=main, name=name))
    return done
