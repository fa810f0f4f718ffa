"""A receiver's own folder: who may be in it, who may have made it, and that it goes again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc import cli, runtime_folder
from sharded_pc.errors import HostError, UsageError
from tests.own_folder import OwnFolder, OwnSuccessor
from tests.synthetic import connect, open_source
from tests.test_process_ends import check_one_error, qmp, receive

NOBODY = 65534


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where runtime folders are made; not below tmp_path, whose length eats that of a socket's."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# --- where it is ---


def test_where_it_is(monkeypatch, place):
    """Below XDG_RUNTIME_DIR, which is ours alone; else the folder's name says whose it is."""
    shared = Path(tempfile.gettempdir()) / f"sharded-pc-{os.geteuid()}-guest0"
    assert runtime_folder.places("guest0") == [place / "sharded-pc-guest0", shared]
    assert runtime_folder.runtime_path("guest0", "attach") == f"{place}/sharded-pc-guest0/attach"
    for value in ("", "run/user/0"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert runtime_folder.places("guest0") == [shared]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_folder.places("guest0") == [shared]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 65])
def test_a_name_cannot_lead_elsewhere(name):
    with pytest.raises(UsageError, match="receiver name"):
        runtime_folder.places(name)


def test_a_path_that_is_too_long(monkeypatch, place, capfd, unique_name):
    """Is said before anything is made, with what to do about it."""
    long = place / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    path = f"{long}/sharded-pc-{unique_name}/attach"
    assert receive("unix:/nowhere", "--name", unique_name) == 2
    check_one_error(
        capfd,
        f"the socket {path} would have a path of {len(path)} bytes, a socket's has at most 107: "
        f"choose a shorter --name, or give --attach and --control",
    )
    assert not list(long.iterdir())


def test_the_longest_name_fits_where_folders_usually_are(monkeypatch):
    for usual in ("/run/user/4294967294", "/tmp"):
        monkeypatch.setattr(tempfile, "tempdir", usual)
        monkeypatch.setenv("XDG_RUNTIME_DIR", usual if usual != "/tmp" else "")
        monkeypatch.setattr(os, "geteuid", lambda: 4294967294)
        for what in ("attach", "control", "monitor", "stream"):
            runtime_folder.runtime_path("x" * 64, what)


# --- who may have made it ---


@pytest.mark.parametrize("mask", [0, 0o077])
def test_it_is_closed_to_others(mask):
    with umask(mask):
        folder = runtime_folder.make("guest0")
    assert mode(folder) == 0o700
    assert runtime_folder.make("guest0") == folder, "a predecessor's is used"
    runtime_folder.remove(folder)
    assert not folder.exists()


def as_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def as_file(folder: Path) -> None:
    folder.write_text("mine")


def as_opened(folder: Path) -> None:
    folder.mkdir(0o700)
    folder.chmod(0o710)


def as_somebody_elses(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("n/a: only root can make another user's folder")
    folder.mkdir(0o700)
    os.chown(folder, NOBODY, NOBODY)


UNSAFE = {
    as_link: "is a symbolic link",
    as_file: "is no folder",
    as_opened: "is open to others (mode 0710)",
    as_somebody_elses: "belongs to uid 65534",
}


@pytest.mark.parametrize("made", UNSAFE, ids=lambda made: made.__name__)
def test_what_somebody_else_has_put_there_is_refused(place, unique_name, capfd, made):
    """Exit 3 before a source can connect, and it is left as it is, also by `clean`."""
    folder = place / f"sharded-pc-{unique_name}"
    made(folder)
    before = folder.lstat()
    assert receive(f"unix:{place}/m", "--name", unique_name) == 3
    said = capfd.readouterr().err
    assert f"the runtime folder {folder} {UNSAFE[made]}, so others could stand between" in said
    assert "remove it, or choose another --name" in said and said.count("sharded-pc: ") == 1
    runtime_folder.clean(unique_name)
    assert folder.lstat() == before


def test_where_everybody_may_rename(place):
    """Such a folder could be exchanged for another under the receiver's feet."""
    place.chmod(0o777)
    with pytest.raises(HostError, match=r"rename what stands in .* \(mode 0777\): set XDG_RUN"):
        runtime_folder.make("guest0")
    place.chmod(0o1777)
    runtime_folder.remove(runtime_folder.make("guest0"))


def test_where_nothing_can_be_made(monkeypatch, place):
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"{place}/none")
    with pytest.raises(HostError, match=r"/none/sharded-pc-guest0: No such file .* set XDG_RU"):
        runtime_folder.make("guest0")


# --- of a whole receiver ---


@pytest.mark.uffd
def test_both_sockets_stand_in_it_by_default(tmp_path, unique_name):
    """Without any option there is a control socket; both are said; nothing is left."""
    with OwnFolder(tmp_path, unique_name, keep=False) as receiver:
        folder = receiver.runtime_folder()
        assert sorted(os.listdir(folder)) == ["attach", "control"]
        assert (mode(folder), {mode(path) for path in folder.iterdir()}) == (0o700, {0o600})
        receiver.uri()
        assert f"guests attach at {folder}/attach\n" in receiver.stderr()
        assert f"QMP is spoken at {folder}/control\n" in receiver.stderr()
        qmp(folder / "control", "quit")
        assert receiver.finish().exit_code == 1
        assert not folder.exists()


@pytest.mark.uffd
def test_what_others_put_there_stays(tmp_path, unique_name):
    """The receiver ends well and removes its own."""
    with (
        OwnFolder(tmp_path, unique_name, keep=False) as receiver,
        open_source(connect(receiver.uri())) as source,
    ):
        notes = receiver.runtime_folder() / "notes"
        notes.write_text("mine")
        source.migrate()
        assert receiver._started().wait(20) == 0
        assert os.listdir(notes.parent) == ["notes"]


@pytest.mark.uffd
def test_paths_that_are_given_are_used_as_given(tmp_path, unique_name):
    class Given(OwnFolder):
        def socket_options(self) -> list[str]:
            return ["--attach", f"{tmp_path}/a", "--control", f"{tmp_path}/c"]

    with Given(tmp_path, unique_name, keep=False) as receiver:
        assert {"a", "c"} <= set(os.listdir(tmp_path))
        assert not receiver.runtime_folder().exists()
        qmp(tmp_path / "c", "quit")
        receiver.finish()


@pytest.mark.uffd
def test_clean_removes_what_a_dead_receiver_left(tmp_path, unique_name, monkeypatch, capsys):
    """Also from where XDG_RUNTIME_DIR is another, if it stood where everybody's stand."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with OwnFolder(tmp_path, unique_name, keep=False) as receiver:
        folder = receiver.runtime_folder()
        receiver.signal(signal.SIGKILL)
        receiver._started().wait()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert cli.main(["clean", "--list", "--name", unique_name]) == 0
        assert sorted(os.listdir(folder)) == ["attach", "control"]
        assert cli.main(["clean", "--name", unique_name]) == 0
        assert "removed" in capsys.readouterr().out
        assert not folder.exists()


@pytest.mark.uffd
def test_a_successor_has_the_same_folder(tmp_path, unique_name):
    """Guests and control clients find it where the dead one was."""
    with (
        OwnFolder(tmp_path, unique_name, keep=False) as receiver,
        open_source(connect(receiver.uri())) as source,
    ):
        source.begin()
        source.wait_switched()
        receiver.signal(signal.SIGKILL)
        receiver._started().wait()
        with OwnSuccessor(tmp_path, unique_name, keep=False) as successor:
            folder = successor.runtime_folder()
            assert sorted(os.listdir(folder)) == ["attach", "control"]
            assert f"goes on\nguests attach at {folder}/attach\nQMP is s" in successor.stderr()
            assert successor.give_up().exit_code == 5
            assert not folder.exists()


@pytest.mark.uffd
def test_a_dead_receivers_sockets_are_replaced(tmp_path, unique_name, place):
    """Shared memory goes with a reboot, what stands in /tmp may not."""
    folder = place / f"sharded-pc-{unique_name}"
    folder.mkdir(0o700)
    for what in ("attach", "control"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(folder / what))
    with OwnFolder(tmp_path, unique_name, keep=False) as receiver:
        qmp(folder / "control", "quit")
        receiver.finish()
