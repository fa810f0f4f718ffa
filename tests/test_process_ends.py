"""How a receiver's process ends: signals, QMP quit, exit codes, and what it says where."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sharded_pc import cli
from tests.qemu import wait_until
from tests.receiver import Outcome, Receiver
from tests.synthetic import (
    BLOCKS,
    ORACLE,
    WAIT_S,
    Background,
    GuestProcess,
    connect,
    missing_pages,
    open_source,
    waits_for_page,
)

pytestmark = pytest.mark.uffd

MISSING = missing_pages(ORACLE, 0)


# --- signals and quit ---


@contextlib.contextmanager
def in_phase(receiver: Receiver, phase: str):
    """A migration that has come so far; in postcopy a guest waits for a page."""
    if phase == "waiting":
        yield None
        return
    with open_source(connect(receiver.uri())) as source, contextlib.ExitStack() as stack:
        source.set_up()
        source.precopy()
        wait_until(lambda: 1 in source.back.pongs, "the receiver to follow", WAIT_S)
        if phase == "precopy":
            yield None
            return
        guest = stack.enter_context(GuestProcess())
        source.switch()
        source.wait_switched()
        guest.ask("attach", str(receiver.attach_path))
        guest.say("visit", 0, MISSING[:1])
        assert source.request() == (0, MISSING[0])
        yield guest


ENDS = {
    "SIGINT": (130, lambda receiver: receiver.signal(signal.SIGINT)),
    "SIGTERM": (143, lambda receiver: receiver.signal(signal.SIGTERM)),
    "quit": (1, lambda receiver: qmp(receiver.control_path, "quit")),
}
PHASES = ("waiting", "precopy", "postcopy")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("end", ENDS)
def test_it_ends_when_told_to(tmp_path, unique_name, phase, end):
    """Exit code, one JSON object that says how it ended, nothing left; a guest goes on waiting."""
    code, tell = ENDS[end]
    with Receiver(tmp_path, unique_name, keep=False, control=True) as receiver:
        with in_phase(receiver, phase) as guest:
            tell(receiver)
            outcome = receiver.finish()
            if guest is not None:
                wait_until(lambda: waits_for_page(guest.pid, guest.pid), "the guest to sleep", WAIT_S)
                assert guest.silent()
    assert outcome.exit_code == code
    assert outcome.info["status"] == "failed"
    assert re.fullmatch("stopped|ended .*", outcome.info["error-desc"])
    assert len(outcome.errors) == (end == "quit"), "who presses ^C knows why it ends"


def qmp(path: Path, command: str) -> dict:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(path))
        with sock.makefile("rw", encoding="utf-8") as file:
            for word in ("qmp_capabilities", command):
                file.write(json.dumps({"execute": word}))
            file.flush()
            lines = (json.loads(line) for line in file)
            replies = [line for line in lines if "return" in line or "error" in line]
    assert replies == [{"return": {}}, {"return": {}}]
    return replies[-1]


def test_a_source_that_goes_away_in_postcopy_is_a_lost_connection(tmp_path, unique_name):
    """Exit 5: the source still has the pages; the guest that waits for one goes on waiting."""
    with Receiver(tmp_path, unique_name, keep=False) as receiver:
        with in_phase(receiver, "postcopy") as guest, contextlib.ExitStack() as stack:
            assert receiver.alive()
            stack.callback(lambda: None)
            hang_up(receiver)
            outcome = receiver.finish()
            assert guest.silent()
    assert outcome.exit_code == 5
    missing = sum(len(missing_pages(ORACLE, n)) for n in range(len(BLOCKS)))
    assert f"in postcopy state RUNNING: {missing} pages are still there" in outcome.errors[0]
