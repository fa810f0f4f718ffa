"""vm.max_map_count: a guest or a worker that can map or register no more says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest_process import GuestFailed, GuestProcess
from tests.synthetic import Receiving, open_source

pytestmark = [pytest.mark.uffd]

NONE, TOO_FEW = 0, 8
"""Mappings left: not one, and enough for the blocks but not for their stripes."""


@pytest.mark.usefixtures("placement")
@pytest.mark.parametrize("left", [NONE, TOO_FEW])
def test_a_guest(tmp_path, unique_name, left):
    """It is told at once, as a host's failure; the receiver goes on, and so does a next attempt."""
    with (
        Receiving(tmp_path, unique_name) as receiver,
        GuestProcess() as guest,
        open_source(receiver.sock) as source,
    ):
        source.begin()
        source.wait_switched()
        with pytest.raises(GuestFailed) as caught:
            guest.ask("attach_with_few_maps", receiver.attach, left)
        assert caught.value.kind == "HostError"
        assert re.search(r": raise .*vm\.max_map_count", caught.value.text)
        guest.ask("attach", receiver.attach)
        source.end()
        assert receiver.finish()["status"] == "completed"
        assert guest.ask("visit_all") == []


def test_a_worker(unique_name):
    command = [sys.executable, "-m", "tests.few_maps", unique_name, str(NONE)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "Cannot allocate memory: raise vm.max_map_count" in done.stdout
