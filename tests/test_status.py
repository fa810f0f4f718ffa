"""`sharded-pc status` and what else people read: all receivers, and names that a terminal obeys."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc import cli, shm
from sharded_pc.errors import UsageError
from sharded_pc.geometry import Geometry, RamBlock
from sharded_pc.memory import GuestMemory
from sharded_pc.observe.status import migration_info
from sharded_pc.printable import PrintableFormatter, printable
from sharded_pc.shm import Segment
from sharded_pc.state import MigrationStatus
from tests.synthetic import WAIT_S, ChangingOracle, Receiving, open_source

ODD = "pc.\x1b[31mram\n\udcff"
"""Sets a colour, makes a line, and is not UTF-8."""


def status(*arguments: str) -> str:
    command = [sys.executable, "-m", "sharded_pc", "status", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=WAIT_S)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


# --- names off the wire ---


@pytest.mark.uffd
def test_names_that_a_terminal_would_obey(tmp_path, unique_name):
    """People see them escaped; in JSON they are what they are."""
    blocks = (RamBlock(ODD, 1 << 20),)
    oracle = ChangingOracle(blocks, seed=1)
    with (
        Receiving(tmp_path, unique_name) as receiver,
        open_source(receiver.sock, oracle) as source,
    ):
        source.set_up()
        receiver.wait_received(0)
        source.precopy()
        receiver.wait_received(1)
        (line,) = (x for x in status(unique_name).splitlines() if x.startswith("blocks "))
        assert line.isprintable() and line.startswith(r"blocks name pc.\x1b[31mram\n\udcff, size ")
        assert json.loads(status(unique_name, "--json"))["blocks"][0]["name"] == ODD
        source.switch()
        source.end()
        receiver.finish()


def test_error_lines_are_printable(capfd):
    assert cli.failed(UsageError(f"what is {ODD}")) == 2
    assert capfd.readouterr().err == "sharded-pc: what is pc.\\x1b[31mram\n\\udcff\n"


def test_log_lines_are_printable():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "refused: %s", (ODD,), None)
    assert PrintableFormatter("%(message)s").format(record) == "refused: pc.\\x1b[31mram\n\\udcff"


def test_logs_are_formatted_so(monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    cli._log_to_stderr("warning")
    assert isinstance(logging.root.handlers[0].formatter, PrintableFormatter)


def test_printable():
    for same in ("", "pc.ram", "0000:00:02.0/vga.vram", "Größe", "日本"):
        assert printable(same) == same
    assert printable("a\tb\x7f\x9b\u202e\n", keep="\n") == "a\\tb\\x7f\\x9b\\u202e\n"


# --- all receivers ---


@pytest.fixture
def receivers(new_name) -> Iterator[dict[str, str]]:
    """{how it is: its name} of one of each."""
    with contextlib.ExitStack() as stack:
        names = {}
        for state in ("alive", "kept", "dead"):
            memory = GuestMemory.create(new_name(), 1)
            stack.callback(memory.close)
            stack.callback(memory.unlink)
            memory.control.status = MigrationStatus.COMPLETED
            memory.define(Geometry.of((RamBlock("pc.ram", 1 << 20),), 1))
            if state == "kept":
                memory.unlink_all_but_ram()
            if state != "alive":
                fcntl.flock(memory._control_segment.fd, fcntl.LOCK_UN)
            names[state] = memory.name
        yield names


def test_status_of_all(receivers):
    lines = status().splitlines()
    for state, name in receivers.items():
        (line,) = (line for line in lines if line.startswith(f"{name}: "))
        assert line.startswith(f"{name}: {state}, completed, ")
    listed = {each["name"]: each for each in json.loads(status("--json"))}
    for state, name in receivers.items():
        each = listed[name]
        assert (each["state"], each["status"]) == (state, "completed")
        assert each["size"] > 0


def test_status_of_one_that_is_only_being_made(unique_name):
    """Its segment is there and has no size yet."""
    segment = Segment.create(f"/{unique_name}{shm.CONTROL}", 0)
    try:
        assert f"{unique_name}: dead, unreadable, 0 MiB" in status().splitlines()
        assert cli.main(["status", unique_name]) == 2
    finally:
        segment.unlink()
        segment.close()


def test_status_of_none(monkeypatch, capsys):
    monkeypatch.setattr(shm, "receivers", lambda: iter(()))
    assert cli.main(["status"]) == 0
    assert cli.main(["status", "--json"]) == 0
    assert capsys.readouterr().out == "no receiver here\n[]\n"
    assert cli.main(["status", "--watch"]) == 2


# --- a name that is not a receiver's ---


def test_semaphores_are_nobodys_blocks(tmp_path: Path, monkeypatch):
    """/dev/shm/sem.NAME: a receiver called `sem` would own them, and `clean` would remove them."""
    with pytest.raises(UsageError, match=r"'sem': /dev/shm/sem\.\* are POSIX semaphores"):
        shm.check_name("sem")  # nothing is made: a broken product would leave it behind
    looked: list[str] = []

    @contextlib.contextmanager
    def look(name: str) -> Iterator[None]:
        looked.append(name)
        yield

    for name in ("sem", "semi"):
        (tmp_path / f"{name}{shm.CONTROL}").touch()
    monkeypatch.setattr(shm, "ROOT", tmp_path)
    monkeypatch.setattr(shm, "_looked_at", look)
    list(shm.receivers())
    assert looked == ["semi"]


def test_a_question_while_the_memory_is_being_made(unique_name):
    """The block list is published a moment before there are bitmaps to count in."""
    memory = GuestMemory.create(unique_name, 1)
    try:
        memory.control.publish(Geometry.of((RamBlock("pc.ram", 1 << 20),), 1))
        info = migration_info(unique_name, memory.control, [])
        assert (info["blocks"], info["ram"]["total"]) == ([], 0)
    finally:
        memory.unlink()
        memory.close()
