"""A memory cgroup's limit: the OOM killer takes a worker, and that is a pause."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from sharded_pc.geometry import RamBlock
from sharded_pc.testing.oracle import PageOracle
from tests.cgroups import Cgroup, cgroup
from tests.control import Control
from tests.guest_process import GuestProcess
from tests.receiver import Receiver
from tests.synthetic import Background, connect, open_source

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.skipif(os.geteuid() != 0, reason="n/a: makes a cgroup, as root"),
]

PAGES = PageOracle((RamBlock("pc.ram", 64 << 20),), zero_share=0.9, dirty_share=0.8, seed=5)
LITTLE = 4 << 20


def in_group(group: Cgroup, folder: Path, name: str) -> Receiver:
    """All that is started there is charged to the group."""
    enter = ["sh", "-c", f'echo $$ > {group.folder}/cgroup.procs && exec "$@"', "sh"]
    options = ("--placement", "copy", "--workers", "2")
    return Receiver(folder, name, None, *options, keep=False, control=True, prefix=enter)


def test_the_memory_limit_of_a_cgroup(tmp_path, unique_name):
    """The guest and the coordinator stay: a worker goes first.  With `copy` workers bring the
    pages in."""
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(cgroup("memory", unique_name))
        receiver = stack.enter_context(in_group(group, tmp_path, unique_name))
        guest = stack.enter_context(GuestProcess(PAGES))
        control = stack.enter_context(contextlib.closing(Control(receiver.control_path)))
        source = stack.enter_context(open_source(connect(receiver.uri()), PAGES))
        source.begin()
        source.wait_switched()
        guest.ask("attach", str(receiver.attach_path))
        group.limit(group.used() + LITTLE)
        sending = Background(source.postcopy)
        why = control.wait_status("postcopy-paused")["error-desc"]
        assert "OOM killer" in why and str(group.limit_file) in why
        group.unlimit()
        guest.say("visit_all")
        with contextlib.suppress(Exception):
            sending.result()
        uri = f"unix:{tmp_path / 'again'}"
        assert control.execute("migrate-recover", uri=uri) == {}
        with contextlib.closing(connect(uri)) as sock:
            source.resume(sock)
            source.end()
            assert guest.answer() == []
            assert receiver.finish().exit_code == 0
