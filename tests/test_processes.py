"""How child processes begin and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from sharded_pc.processes import is_alive
from tests.qemu import wait_until
from tests.synthetic import WAIT_S

STOPPED = """
import os, signal, sys, time
from sharded_pc import processes

if __name__ == "__main__":
    process, conn = processes.start(time.sleep, name="child")
    while os.readlink(f"/proc/{process.pid}/exe").endswith("sharded-pc-child"):
        pass
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_child_that_is_stopped_while_it_starts_dies_with_its_parent(tmp_path):
    """A spare that somebody stops, whose coordinator crashes then, is not left."""
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
    try:
        wait_until(lambda: not is_alive(pid), "the child's end", WAIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
