"""A source host that vanishes without a word: found out in time, and called by its name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_pc.transport import liveness
from tests.lost_network import PHASES

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(60)]

ROOT = Path(__file__).parents[1]
LIMIT_S = 30.0
"""The kernel's two hours are longer."""


@pytest.mark.parametrize("phase", PHASES)
def test_a_source_host_that_vanishes(unique_name, phase):
    """Exit 4 while the source's guest can go on, 5 when the source has pages that are nowhere
    else; never 3, as if it were this host's fault."""
    command = [sys.executable, "-m", "tests.lost_network", unique_name, phase]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    end = json.loads(done.stdout)
    if "n/a" in end:
        pytest.skip(f"n/a: may not make a network namespace: {end['n/a']}")
    if phase.startswith("postcopy"):
        assert (end["exit"], "pages are still there" in end["error"]) == (5, True), end
    else:
        assert end["exit"] == 4, end
    assert "connection to the source was lost" in end["error"]
    assert "Traceback" not in done.stderr


def test_the_limits_are_some_tens_of_seconds():
    """Long enough for a switch that reboots, far below the kernel's defaults."""
    probing = liveness.KEEP_COUNT * liveness.KEEP_INTERVAL_SECONDS
    assert 20 <= liveness.KEEP_IDLE_SECONDS + probing <= 90
    assert 20 <= liveness.USER_TIMEOUT_SECONDS <= 90
