"""How a receiver's process ends: signals, QMP quit, exit codes, and what it says where."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc import cli
from sharded_pc.observe.view import ReceiverView
from tests.guest_process import GuestProcess, waits_for_page
from tests.qemu import wait_until
from tests.receiver import Receiver
from tests.synthetic import BLOCKS, ORACLE, WAIT_S, StepSource, connect, missing_pages, open_source

pytestmark = pytest.mark.uffd

MISSING = missing_pages(ORACLE, 0)


# --- signals and quit ---


@contextlib.contextmanager
def in_phase(
    receiver: Receiver, phase: str
) -> Iterator[tuple[StepSource | None, GuestProcess | None]]:
    """A migration that has come so far; in postcopy a guest waits for a page."""
    if phase == "waiting":
        yield None, None
        return
    with open_source(connect(receiver.uri())) as source, contextlib.ExitStack() as stack:
        source.set_up()
        source.precopy()
        wait_until(lambda: 1 in source.back.pongs, "the receiver to follow", WAIT_S)
        if phase == "precopy":
            yield source, None
            return
        guest = stack.enter_context(GuestProcess())
        source.switch()
        source.wait_switched()
        guest.ask("attach", str(receiver.attach_path))
        guest.say("visit", 0, MISSING[:1])
        assert source.request() == (0, MISSING[0])
        yield source, guest


def check_waits(guest: GuestProcess) -> None:
    wait_until(lambda: waits_for_page(guest.pid, guest.pid), "the guest to sleep", WAIT_S)
    assert guest.silent()


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
    with (
        Receiver(tmp_path, unique_name, keep=False, control=True) as receiver,
        in_phase(receiver, phase) as (_, guest),
    ):
        tell(receiver)
        outcome = receiver.finish()
        if guest is not None:
            check_waits(guest)
    assert outcome.exit_code == code
    assert outcome.info["status"] == "cancelled"
    assert outcome.info["error-desc"] == "ended on request"
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
    with (
        Receiver(tmp_path, unique_name, keep=False, control=True) as receiver,
        in_phase(receiver, "postcopy") as (source, guest),
    ):
        source._sock.shutdown(socket.SHUT_RDWR)
        outcome = receiver.give_up()
        check_waits(guest)
    assert outcome.exit_code == 5
    missing = sum(len(missing_pages(ORACLE, n)) for n in range(len(BLOCKS)))
    assert f"in postcopy state RUNNING: {missing} pages are still there" in outcome.errors[0]


# --- what it says where ---


class Terse(Receiver):
    """Without --json."""

    def command(self, *more: str) -> list[str]:
        return [word for word in super().command(*more) if word != "--json"]


@pytest.mark.parametrize("kind", [Receiver, Terse])
def test_a_good_end(tmp_path, unique_name, kind):
    """Exit 0; one JSON object on stdout if asked for, else not a byte; no error on stderr."""
    with (
        kind(tmp_path, unique_name, keep=False) as receiver,
        open_source(connect(receiver.uri())) as source,
    ):
        source.migrate()
        outcome = receiver.finish()
    assert (outcome.exit_code, outcome.errors) == (0, [])
    assert (outcome.info is None) is (kind is Terse)
    if outcome.info:
        assert (outcome.info["status"], outcome.info["error-desc"]) == ("completed", None)


# --- asked for what makes no sense: 2; for what this host does not have: 3 ---

USAGE = {
    "no address": ([], "INCOMING is missing: tcp:HOST:PORT"),
    "unknown address": (["smtp:x"], "address 'smtp:x': expected tcp:HOST:PORT"),
    "empty address": ([""], "address '': expected tcp:HOST:PORT"),
    "no port": (["tcp:localhost"], "expected HOST:PORT"),
    "no path": (["unix:"], "unix address without a path"),
    "long path": (["unix:/" + "x" * 107], "at most 107 bytes"),
    "no descriptor": (["fd:stdin"], "expected the number of an inherited descriptor"),
    "closed descriptor": (["fd:987"], "fd:987: descriptor 987 is not open"),
    "no command": (["exec: "], "exec address without a command"),
    "bad offset": (["file:/dev/null,offset=-1"], "file offset '-1'"),
    "bad name": (["exec:true", "--name", "a/b"], "receiver name 'a/b': use 1 to 64 letters"),
    "no workers": (["exec:true", "--workers", "0"], "0 workers: expected 1 to 64"),
    "many workers": (["exec:true", "--workers", "65"], "65 workers: expected 1 to 64"),
    "not a number": (["exec:true", "--workers", "two"], "invalid int value"),
    "placement": (["exec:true", "--placement", "move"], "invalid choice: 'move'"),
    "closed status": (["exec:true", "--status-fd", "987"], "--status-fd 987: that descriptor is n"),
    "readable status": (["exec:true", "--status-fd", "READING"], "status descriptor .*: Bad file"),
    "nobody reads": (["exec:true", "--status-fd", "UNREAD"], "status descriptor .*: Broken pipe"),
}
HOST = {
    "record, no folder": (
        ["--record", "{d}/no/r"],
        "record to {d}/no/r: No such file or directory",
    ),
    "record, a folder": (["--record", "{d}"], "record to {d}: Is a directory"),
    "attach, no folder": (["--attach", "{d}/no/a"], "{d}/no/a: No such file or directory"),
    "control, no folder": (["--control", "{d}/no/c"], "{d}/no/c: No such file or directory"),
    "attach, a file": (["--attach", "{d}/file"], "{d}/file: Address already in use"),
    "attach, too long": (["--attach", "{d}/" + "x" * 107], "path too long"),
    "incoming, no folder": (["unix:{d}/no/m"], "{d}/no/m: No such file or directory"),
    "incoming, no file": (["file:{d}/no"], "file:{d}/no: No such file or directory"),
}


def receive(*arguments: str) -> int:
    """The command in this process; its exit code.  It is told to end if it waits for a source."""
    watchdog = threading.Timer(WAIT_S / 2, os.kill, (os.getpid(), signal.SIGTERM))
    watchdog.start()
    try:
        return cli.main(["receive", *arguments, "--json", "--no-progress"])
    except SystemExit as end:
        return end.code
    finally:
        watchdog.cancel()


@pytest.mark.parametrize("case", USAGE)
def test_usage(new_name, capfd, case):
    """Exit 2, one clear error; nothing on stdout but the JSON of a receiver that had begun."""
    arguments, expected = USAGE[case]
    (unread, nobody), (reading, writing) = os.pipe(), os.pipe()
    os.close(unread)
    numbers = {"READING": str(reading), "UNREAD": str(nobody)}
    arguments = [numbers.get(word, word) for word in arguments]
    if arguments and "--name" not in arguments:
        arguments += ["--name", new_name()]
    assert receive(*arguments) == 2
    check_one_error(capfd, expected, began=case in ("readable status", "nobody reads"))
    for fd in (nobody, reading, writing):
        os.close(fd)


@pytest.mark.parametrize("case", HOST)
def test_what_the_host_does_not_have(tmp_path, unique_name, capfd, case):
    """Exit 3 and an error that names the path, before a source could connect."""
    options, expected = (
        [word.format(d=tmp_path) for word in words] for words in listed(HOST[case])
    )
    (tmp_path / "file").write_text("mine")
    incoming = [] if ":" in options[0] else [f"unix:{tmp_path}/m"]
    assert receive(*incoming, *options, "--name", unique_name) == 3
    check_one_error(capfd, re.escape(expected[0]))
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def listed(case: tuple[list[str], str]) -> tuple[list[str], list[str]]:
    return case[0], [case[1]]


def check_one_error(capfd: pytest.CaptureFixture, expected: str, *, began: bool = False) -> None:
    said = capfd.readouterr()
    assert len(re.findall("^sharded-pc.*: ", said.err, re.MULTILINE)) == 1, said.err
    assert re.search(expected, said.err), said.err
    assert "listening on" not in said.err or began
    assert bool(said.out) == began and "Traceback" not in said.err


# --- sockets that stand there already ---


def test_sockets_of_the_dead_are_replaced(tmp_path, unique_name):
    """kill -9 leaves socket files; the next receiver of these paths takes them over."""
    receiver = Receiver(tmp_path, unique_name, keep=False, control=True)
    incoming = receiver.incoming.removeprefix("unix:")
    for path in (receiver.attach_path, receiver.control_path, incoming):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    with receiver, in_phase(receiver, "postcopy") as (source, guest):
        source.end()
        assert guest.answer() is None
        assert receiver.finish().exit_code == 0


def test_sockets_of_the_living_are_left_alone(tmp_path, new_name, capfd):
    """Whoever asks for a live receiver's path is refused, and the live one does not even notice."""
    with Receiver(tmp_path, new_name(), keep=False, control=True) as living:
        free = f"unix:{tmp_path}/free"
        for arguments in (
            [living.incoming],
            [free, "--attach", str(living.attach_path)],
            [free, "--control", str(living.control_path)],
        ):
            assert receive(*arguments, "--name", new_name()) == 3
            check_one_error(capfd, "Address already in use")
        with in_phase(living, "postcopy") as (source, guest):
            source.end()
            assert guest.answer() is None
            outcome = living.finish()
    assert (outcome.exit_code, outcome.errors) == (0, [])


def test_a_stopped_worker_does_not_outlive_its_coordinator(tmp_path, unique_name):
    """It cannot see its pipe close."""
    with Receiver(tmp_path, unique_name, keep=False) as receiver:
        with ReceiverView(receiver.name) as view:
            pids = [shard["pid"] for shard in view.info()["sharded"]["shards"]]
        os.kill(receiver.pid, signal.SIGSTOP)  # else it would replace a stopped worker
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        os.kill(receiver.pid, signal.SIGKILL)
        wait_until(lambda: not set(receiver.processes()) & set(pids), "the workers' end", WAIT_S)
