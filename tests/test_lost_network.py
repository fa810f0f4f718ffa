"""A source host that vanishes without a word: found out in time, and called by its name."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_pc import address
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


@pytest.mark.qemu
@pytest.mark.timeout(120)
def test_a_half_open_wire_of_a_real_source(tmp_path, unique_name, newer):
    """Neither FIN nor RST comes: the receiver pauses by keep-alive, the source by `migrate-pause`,
    and both go on over another connection."""
    pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")
    command = [sys.executable, "-m", "tests.half_open", str(tmp_path), unique_name, str(newer)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110)
    assert done.returncode == 0, done.stderr
    end = json.loads(done.stdout)
    if "n/a" in end:
        pytest.skip(f"n/a: may not make a network namespace: {end['n/a']}")
    assert "the connection to the source was lost" in end["paused by"]
    assert end["source"] == "postcopy-active", "it has heard of nothing"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (1, liveness.KEEP_IDLE_SECONDS, liveness.KEEP_INTERVAL_SECONDS,
              liveness.KEEP_COUNT, liveness.USER_TIMEOUT_SECONDS * 1000)),
        (",keep-alive-idle=5,keep-alive-interval=2,keep-alive-count=4", (1, 5, 2, 4, 13000)),
        (",keep-alive=off", (0, None, None, None, 0)),
    ],
)  # fmt: skip
def test_options_of_the_address(text, expected):
    """QEMU's, as far as they are about this."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        with socket.create_connection((host, port)) as sock:
            where = address.parse(f"tcp:{host}:{port}{text}")
            before = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            liveness.watch_peer(sock, where.keep_alive)
            on = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT,
                       socket.TCP_USER_TIMEOUT)  # fmt: skip
            found = [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options]
            assert (on, found[3]) == (expected[0], expected[4])
            assert found[:3] == list(expected[1:4]) if expected[1] else found[0] == before
