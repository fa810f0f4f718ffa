"""Guests are on huge pages after a `continue` migration onto a /dev/shm that has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.skipif(os.geteuid() != 0, reason="n/a: mounts a /dev/shm of its own, as root"),
]


def migrate(*arguments: str) -> dict:
    """The info of a migration in a mount namespace (tests/huge_pages.py)."""
    command = ["unshare", "--mount", sys.executable, "-m", "tests.huge_pages", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("placement", ["continue", "copy"])
def test_guest_ends_on_huge_pages(placement: str) -> None:
    info = migrate(placement, "advise")
    assert info["sharded"]["placement"] == placement
    if placement == "continue":
        # What came before it was populated stands on small pages; the guest maps the rest whole.
        huge = info["sharded"]["huge-pages"]
        assert huge["receiver"] >= 16 << 20
        assert huge["guests"] >= huge["receiver"]
    else:
        assert info["sharded"]["huge-pages"] is None


@pytest.mark.parametrize("huge", ["always", "within_size"])
def test_a_punch_that_makes_no_hole_loses_nothing(huge: str) -> None:
    """Somebody holds huge pages that a discard cuts: the kernel zeroes and keeps what it cannot
    punch, and a guest would take that for the source's page."""
    info = migrate("copy", huge, "held")
    unpunched = sum(shard["unpunched-pages"] for shard in info["sharded"]["shards"])
    assert unpunched > 100, "this kernel punched what was held: the test tests nothing"
    assert info["ram"]["postcopy-requests"] > 0
