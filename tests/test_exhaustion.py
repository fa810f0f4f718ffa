"""Resources run out while pages are missing: a pause that names them, and a recovery once there is
room (tests/exhaustion.py)."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_pc.geometry import Placement
from tests.control import Control
from tests.receiver import Receiver
from tests.synthetic import connect, open_source

pytestmark = pytest.mark.uffd


@pytest.mark.skipif(os.geteuid() != 0, reason="n/a: mounts a /dev/shm of its own, as root")
@pytest.mark.parametrize("placement", list(Placement))
def test_others_fill_dev_shm(placement):
    """No SIGBUS, no lost page: the guest that waited reads what the source has."""
    command = ["unshare", "--mount", sys.executable, "-m", "tests.exhaustion", placement.value]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=55, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    paused, fared = done.stdout.splitlines()
    assert "make room in /dev/shm" in json.loads(paused)
    assert fared == "right"


def test_descriptors_run_out(tmp_path, unique_name):
    """`migrate-recover` says so, and works when there are some again."""
    receiver = Receiver(tmp_path, unique_name, control=True, keep=False)
    with receiver, open_source(connect(receiver.uri())) as source:
        source.begin()
        source.wait_switched()
        with contextlib.closing(Control(receiver.control_path)) as control:
            control.execute("migrate-pause")
            control.wait_status("postcopy-paused")
            uri = f"unix:{tmp_path / 'again'}"
            before = resource.prlimit(receiver.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(receiver.pid, resource.RLIMIT_NOFILE, (3, before[1]))
            assert "Too many open files" in str(control.execute("migrate-recover", uri=uri))
            assert control.execute("query-migrate")["status"] == "postcopy-paused"
            resource.prlimit(receiver.pid, resource.RLIMIT_NOFILE, before)
            assert control.execute("migrate-recover", uri=uri) == {}
            with contextlib.closing(connect(uri)) as sock:
                source.resume(sock)
                source.end()
                assert receiver.finish().exit_code == 0
