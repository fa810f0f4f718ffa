"""Guests are on huge pages after a `continue` migration onto a /dev/shm that has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.uffd


@pytest.mark.skipif(os.geteuid() != 0, reason="n/a: mounts a /dev/shm of its own, as root")
@pytest.mark.parametrize("placement", ["continue", "copy"])
def test_guest_ends_on_huge_pages(placement: str) -> None:
    command = ["unshare", "--mount", sys.executable, "-m", "tests.huge_pages", placement]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["sharded"]["placement"] == placement
    if placement == "continue":
        # What came before it was populated stands on small pages; the guest maps the rest whole.
        huge = info["sharded"]["huge-pages"]
        assert huge["receiver"] >= 16 << 20
        assert huge["guests"] >= huge["receiver"]
    else:
        assert info["sharded"]["huge-pages"] is None
