"""A receiver that died, and its successor: `--resume NAME`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc.observe.view import ReceiverView
from sharded_pc.testing.oracle import DIRTIED
from tests.control import Control
from tests.guest_process import GuestProcess
from tests.qemu import wait_until
from tests.receiver import Receiver, Successor
from tests.synthetic import BLOCKS, ORACLE, WAIT_S, StepSource, connect, missing_pages, open_source

pytestmark = [pytest.mark.uffd, pytest.mark.usefixtures("placement")]

DATA = missing_pages(ORACLE, 0, DIRTIED)
MISSING = sum(len(missing_pages(ORACLE, n)) for n in range(len(BLOCKS)))


@contextlib.contextmanager
def begun(
    folder: Path, name: str, **more: bool
) -> Iterator[tuple[Receiver, StepSource, GuestProcess]]:
    """A guest on a receiver that has 64 pages of what postcopy is to bring."""
    receiver = Receiver(folder, name, keep=False, **more)
    with receiver, GuestProcess() as guest, open_source(connect(receiver.uri())) as source:
        source.begin()
        source.wait_switched()
        guest.ask("attach", str(receiver.attach_path))
        source.send_pages(0, DATA[:64])
        assert guest.ask("visit", 0, DATA[:64]) is None
        yield receiver, source, guest


def kill(receiver: Receiver, *, workers: bool) -> None:
    """The coordinator, or everything at once."""
    with ReceiverView(receiver.name) as view:
        shards = [shard["pid"] for shard in view.info()["sharded"]["shards"]]
    for pid in [receiver.pid, *(shards if workers else ())]:
        os.kill(pid, signal.SIGKILL)
    receiver._started().wait(WAIT_S)


@contextlib.contextmanager
def resumed(receiver: Receiver) -> Iterator[tuple[Successor, Control]]:
    successor = Successor(receiver.folder, receiver.name, control=True, keep=False)
    with successor, contextlib.closing(Control(successor.control_path)) as control:
        yield successor, control


@pytest.mark.parametrize("workers", [False, True], ids=["the coordinator", "everything"])
def test_a_killed_receiver_is_resumed(tmp_path, unique_name, workers):
    """Invariants 3 and 5: what had arrived is there, what had not is waited for, by the thread that
    waited before and by others, and comes from the source by QEMU's recovery."""
    with begun(tmp_path, unique_name) as (receiver, source, guest):
        kill(receiver, workers=workers)
        with resumed(receiver) as (successor, control):
            info = control.wait_status("postcopy-paused")
            assert "died" in info["error-desc"]
            assert info["ram"]["remaining"] == (MISSING - 64) * 4096
            uri = f"unix:{tmp_path / 'again'}"
            assert control.execute("migrate-recover", uri=uri) == {}
            with contextlib.closing(connect(uri)) as sock:
                source.resume(sock)
                source.end()
                outcome = successor.finish()
        assert (outcome.exit_code, outcome.info["status"]) == (0, "completed")
        assert guest.ask("visit_all") == []


def test_a_guest_that_never_ran_cannot_be_resumed(tmp_path, unique_name):
    """The source goes on with it; `clean` removes what is left."""
    receiver = Receiver(tmp_path, unique_name, keep=False)
    with receiver:
        with open_source(connect(receiver.uri())) as source:
            source.set_up()
            source.precopy()
            wait_until(lambda: 1 in source.back.pongs, "the receiver to follow", WAIT_S)
            kill(receiver, workers=True)
        code, text = resume(unique_name)
        assert code == 2
        assert text.startswith(
            f"sharded-pc: receiver '{unique_name}' cannot be resumed: its guest did not run here "
            "(postcopy state ADVISE, status active); the source goes on with it"
        )
        assert receiver.segments()


def resume(name: str, *more: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "sharded_pc", "receive", "--resume", name, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_what_cannot_be_resumed(tmp_path, unique_name):
    assert resume(unique_name) == (
        2, f"sharded-pc: there is no receiver '{unique_name}' to resume\n"
    )  # fmt: skip
    assert resume(unique_name, "--name", "other") == (
        2, f"sharded-pc: --resume {unique_name} and --name other are two receivers\n"
    )  # fmt: skip
    with begun(tmp_path, unique_name) as (receiver, source, guest):
        code, text = resume(unique_name)
        assert code == 3 and "it may be alive" in text
        source.end()
        receiver.finish()
        assert guest.ask("visit_all") == []


def test_clean_leaves_what_can_be_resumed(tmp_path, unique_name):
    with begun(tmp_path, unique_name) as (receiver, *_):
        kill(receiver, workers=True)
        assert "resumable (--resume takes it up" in clean("--name", unique_name)
        assert receiver.segments()
        assert "removed" in clean("--name", unique_name, "--resumable")
        assert not receiver.segments()


def clean(*arguments: str) -> str:
    command = [sys.executable, "-m", "sharded_pc", "clean", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_what_has_completed_is_not_resumed(tmp_path, unique_name):
    """The guest is whole: nobody may say that its source goes on with it."""
    with begun(tmp_path, unique_name, control=True) as (receiver, source, guest):
        with contextlib.closing(Control(receiver.control_path)):  # it stays for a last word
            source.end()
            with ReceiverView(unique_name) as view:
                wait_until(lambda: view.info()["status"] == "completed", "the end", WAIT_S)
            kill(receiver, workers=False)
        code, text = resume(unique_name)
        assert code == 2
        assert "its migration has completed" in text and "the source" not in text
        assert guest.ask("visit_all") == []
