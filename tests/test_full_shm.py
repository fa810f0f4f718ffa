"""Others fill /dev/shm once the guest has arrived (tests/full_shm.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_pc import cli

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.skipif(os.geteuid() != 0, reason="n/a: mounts a /dev/shm of its own, as root"),
]


def migrate(*arguments: str) -> tuple[dict, str]:
    command = ["unshare", "--mount", sys.executable, "-m", "tests.full_shm", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    info, fared = done.stdout.splitlines()
    return json.loads(info), fared


def test_reserved_memory_stays():
    info, fared = migrate("continue", "reserve")
    assert info["sharded"]["unreserved"] == 0
    assert fared == "right"


def test_what_is_not_reserved_is_told():
    """A sparse guest with `copy`: what it has not touched is not there when it does."""
    info, fared = migrate("copy")
    assert info["sharded"]["unreserved"] > 1 << 20
    assert fared == f"signal {signal.SIGBUS}"


@pytest.mark.parametrize("words", [["receive", "tcp:127.0.0.1:0"], ["run", "unix:/tmp/none"]])
def test_reserve_needs_continue(words, capsys):
    tail = ["--", "qemu-system-x86_64"] if words[0] == "run" else []
    code = cli.main([*words, "--reserve", "--placement", "copy", *tail])
    assert code == 2 and "use --placement continue" in capsys.readouterr().err
