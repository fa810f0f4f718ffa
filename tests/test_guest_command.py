"""`sharded-pc guest`: a program that maps RAM in ways of its own, and knows nothing of us."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc import shm
from sharded_pc.attach import broker
from sharded_pc.attach.broker import Broker
from sharded_pc.errors import AttachError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.observe.view import ReceiverView
from sharded_pc.testing.oracle import DIRTIED, PageOracle
from sharded_pc.transport.peers import Peer
from tests.control import Control
from tests.mapper import GUEST, Mapper, mapper, sender
from tests.preload_kit import MIB, WAIT_S, Source
from tests.qemu import wait_until
from tests.receiver import Receiver, Successor
from tests.synthetic import connect, missing_pages, open_source

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

SIZE = 8 * MIB
PAGES = SIZE // PAGE_BYTES
HALF = SIZE // 2
ORACLE = PageOracle((RamBlock("pc.ram", SIZE), RamBlock("rom", 64 << 10)), seed=5)
MISSING = missing_pages(ORACLE, 0)
RATE = 8 * MIB
"""Bytes per second of pages that nobody asks for."""


class Found(Receiver):
    """Its sockets stand where its name says."""

    def socket_options(self) -> list[str]:
        return []

    @property
    def attach_path(self) -> Path:
        return self.runtime_folder() / "attach"

    @attach_path.setter
    def attach_path(self, path: Path) -> None:
        pass


@contextlib.contextmanager
def switched(folder: Path, name: str, **more: object) -> Iterator[tuple[Receiver, Source, Path]]:
    """A receiver whose guest may run, and the file of its first block."""
    with Receiver(folder, name, **more) as receiver, Source(receiver, ORACLE, RATE) as source:
        source.switch()
        yield receiver, source, shm.ROOT / source.files()[0]


def versions(folder: Path) -> Path:
    """What `visit` wants."""
    path = folder / "versions"
    path.write_bytes(ORACLE.final(0))
    return path


def visit(program: Mapper, map_: int, folder: Path, first: int = 0, count: int = PAGES) -> None:
    program.do("visit", map_, first, count, 0, ORACLE.seed, versions(folder))


def attached(name: str) -> int:
    with ReceiverView(name) as view:
        return view.info()["sharded"]["guests"]


def named(receiver: Receiver) -> tuple[str, ...]:
    return ("--name", receiver.name, "--attach", str(receiver.attach_path))


def maps_of(program: Mapper, path: Path) -> int:
    """Stretches of the file in the program's address space."""
    return Path(f"/proc/{program.process.pid}/maps").read_text().count(str(path))


def wait_no_uffds(program: Mapper) -> None:
    wait_until(lambda: program.do("uffds") == "0", "the end of userfaultfds", WAIT_S)


@pytest.mark.usefixtures("placement")
def test_parts_at_several_places(tmp_path, unique_name, mapper):
    """Sent and by path, above and below 4 GiB, unmapped and mapped again: each page is waited for
    and right, also for the kernel."""
    with switched(tmp_path, unique_name) as (receiver, source, ram):
        token = os.open(ram, os.O_PATH)
        with (
            sender(tmp_path / "sock", token) as sock,
            Mapper(mapper, *named(receiver)) as program,
            map_parts(program, sock, ram, unique_name),
            source.postcopy(),
        ):
            for map_ in (1, 0):
                first = map_ * PAGES // 2
                program.do("save", map_, 0, 64 * PAGE_BYTES, tmp_path / "saved")
                pages = range(first, first + 64)
                expected = [ORACLE.page(0, page, ORACLE.final(0)[page]) for page in pages]
                assert (tmp_path / "saved").read_bytes() == b"".join(expected)
            program.do("unmap", 1, 0, HALF)
            visit(program, 2, tmp_path, PAGES // 2, PAGES // 2)
            program.do("map", 1, 1, HALF, HALF, "readonly")
            visit(program, 1, tmp_path, PAGES // 2, PAGES // 2)
            visit(program, 0, tmp_path, 0, PAGES // 2)
            (tmp_path / "more").write_bytes(b"k" * PAGE_BYTES)
            program.do("load", 0, 5 * PAGE_BYTES, PAGE_BYTES, tmp_path / "more")
            program.do("write", 2, HALF, 0x77)
            assert program.do("read", 1, 0) == str(0x77)
            receiver_end(receiver, program, ram)
            program.do("unmap", 0, 0, HALF)
            program.do("unmap", 2, 0, HALF)
            assert program.do("read", 1, 0) == str(0x77)
            program.do("unmap", 1, 0, HALF)
            assert maps_of(program, ram) > 0  # the upper half of what was whole
            program.do("unmap", 2, HALF, HALF)
            assert maps_of(program, ram) == 0
        content = receiver.segment_bytes("pc.ram")
    assert content[5 * PAGE_BYTES : 6 * PAGE_BYTES] == b"k" * PAGE_BYTES
    assert content[HALF] == 0x77


@contextlib.contextmanager
def map_parts(program: Mapper, sock: Path, ram: Path, name: str) -> Iterator[None]:
    assert program.do("receive", 0, sock) == "real"
    program.do("map", 0, 0, 0, HALF, "shared")
    program.do("map", 1, 0, HALF, HALF, "shared")
    program.do("open", 1, ram)
    program.do("map", 2, 1, 0, SIZE, "populate")
    assert attached(name) == 1
    yield


def receiver_end(receiver: Receiver, program: Mapper, ram: Path) -> None:
    """All is here: nothing is registered, and what is mapped from now on is an ordinary mapping."""
    assert receiver.finish().info["status"] == "completed"
    wait_no_uffds(program)
    program.do("map", 5, 1, PAGE_BYTES, PAGE_BYTES, "fixed")
    assert program.do("read", 5, 0) == str(ORACLE.page(0, 1, ORACLE.final(0)[1])[0])
    program.do("unmap", 5, 0, PAGE_BYTES)


@pytest.mark.usefixtures("placement")
def test_pages_that_change_after_they_were_mapped(tmp_path, unique_name, mapper):
    """Mapped as soon as there is anything to be mapped, before a page of it is here."""
    with (
        Mapper(
            mapper, "--name", unique_name, "--attach", str(tmp_path / f"{unique_name}.attach")
        ) as program,
        Receiver(tmp_path, unique_name) as receiver,
        Source(receiver, ORACLE, RATE) as source,
    ):
        ram = shm.ROOT / source.files()[0]
        program.do("open", 0, ram)
        program.do("map", 0, 0, 0, SIZE, "shared")
        source.source.precopy()
        page = next(n for n in MISSING if ORACLE.precopied(0)[n])
        if "copy" in receiver._options:  # with the other it is not seen before it may be
            stale = ORACLE.page(0, page, ORACLE.precopied(0)[page])[9]
            wait_until(lambda: program.do("read", 0, page * PAGE_BYTES + 9) == str(stale), "it")
        source.source.switch()
        source.wait_running()
        with source.postcopy():
            visit(program, 0, tmp_path)
        receiver.finish()


def test_a_receiver_is_found_by_its_ram(tmp_path, unique_name, mapper):
    """Without --name and --attach; a shell stands in front; other files are as they were."""
    with Mapper(mapper, wrapper=["sh", "-c", 'true; "$0"; exit $?']) as program:
        other = shm.ROOT / f"{unique_name}.other"
        other.write_bytes(b"o" * PAGE_BYTES)
        try:
            program.do("open", 1, other)
            program.do("map", 1, 1, 0, PAGE_BYTES, "private")
            assert program.do("read", 1, 0) == str(ord("o"))
        finally:
            other.unlink()
        with Found(tmp_path, unique_name) as receiver, Source(receiver, ORACLE, RATE) as source:
            source.switch()
            program.do("open", 0, shm.ROOT / source.files()[0])
            with source.postcopy():
                program.do("map", 0, 0, 0, SIZE, "shared")
                visit(program, 0, tmp_path)
            receiver.finish()
            wait_no_uffds(program)


def test_behind_a_filter_of_system_calls(tmp_path, unique_name, mapper):
    """In another root and other namespaces, without ioctl, openat, socket and the like."""
    (tmp_path / "jail").mkdir()
    with (
        switched(tmp_path, unique_name) as (receiver, source, ram),
        Mapper(mapper, *named(receiver)) as program,
        source.postcopy(),
    ):
        program.do("open", 0, ram)
        program.do("jail", tmp_path / "jail")
        program.do("map", 0, 0, 0, SIZE, "shared")
        for page in MISSING[::50]:
            wanted = ORACLE.page(0, page, DIRTIED)[7]
            assert program.do("read", 0, page * PAGE_BYTES + 7) == str(wanted)
        assert receiver.finish().info["status"] == "completed"
        assert program.do("read", 0, 0) == str(ORACLE.page(0, 0, ORACLE.final(0)[0])[0])


@pytest.mark.usefixtures("placement")
def test_children(tmp_path, unique_name, mapper):
    """One that maps by itself is a guest by itself, whether its parent is one or not."""
    with (
        switched(tmp_path, unique_name) as (receiver, source, ram),
        Mapper(mapper, *named(receiver)) as program,
    ):
        program.do("open", 0, ram)
        program.do("fork")
        program.do("map", 0, 0, 0, SIZE, "shared")
        assert attached(unique_name) == 1
        program.do("fork")
        program.do("map", 1, 0, HALF, HALF, "shared")
        assert attached(unique_name) == 2
        with source.postcopy():
            visit(program, 1, tmp_path, PAGES // 2, PAGES // 2)
        assert receiver.finish().info["status"] == "completed"


def test_what_cannot_be_served_is_refused(tmp_path, unique_name, mapper):
    with switched(tmp_path, unique_name, keep=False) as (receiver, source, ram):
        with Mapper(mapper, *named(receiver)) as program:
            program.do("open", 0, ram)
            program.do("map", 0, 0, HALF, HALF, "shared")
            assert program.ask("map", 1, 0, 0, SIZE, "private") == "error EINVAL"
            assert program.ask("map", 1, 0, 0, SIZE, "fixed") == "error EINVAL"
            assert program.ask("map", 1, 0, 0, SIZE + PAGE_BYTES, "shared") == "error EINVAL"
            assert program.ask("grow", 0) == "error ENOMEM"
            errors = program.finish()
        for why in ("mapped private", "MAP_FIXED", "not all in it", "mremap"):
            assert why in errors
        with Mapper(mapper, "--name", "somebody-else") as program:
            program.do("open", 0, ram)
            assert program.ask("map", 0, 0, 0, SIZE, "shared") == "error EACCES"
            assert f"is RAM of the receiver '{unique_name}', this program" in program.finish()
        token = os.open(ram, os.O_PATH)
        nowhere = ("--attach", str(tmp_path / "nowhere"), "--timeout", "0.2")
        with sender(tmp_path / "sock", token) as sock, Mapper(mapper, *nowhere) as program:
            assert program.do("receive", 0, sock) == "token"
            assert program.ask("map", 0, 0, 0, SIZE, "shared") == "error EACCES"
            assert f"--resume {unique_name}" in program.finish()
        with source.postcopy():
            pass
        assert receiver.finish().exit_code == 0


def test_a_receiver_of_another_user(tmp_path, monkeypatch):
    """It could write into the program: only who is named may."""
    monkeypatch.setattr(broker, "peer_of", lambda _: Peer(7, 4711, 4711))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "attach"))
        server.listen()
        trusts = {"name": None, "attach": None, "seconds": 1}
        with pytest.raises(AttachError, match=r"belongs to uid 4711.*guest --user 4711"):
            Broker(server, -1, user=None, **trusts)._try(tmp_path / "attach")
        Broker(server, -1, user=4711, **trusts)._try(tmp_path / "attach").close()


@pytest.mark.parametrize("how", ["static", "setuid"])
def test_a_program_that_loads_nothing(how, tmp_path):
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text("int main(void) { return 0; }\n")
    static = ["-static"] if how == "static" else []
    if subprocess.run(["cc", *static, "-o", program, source], capture_output=True).returncode:
        pytest.skip("n/a: no static C library")
    program.chmod(0o4755 if how == "setuid" else 0o755)
    done = subprocess.run([*GUEST, "--", program], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 3
    assert ("is statically linked" if static else "gets privileges") in done.stderr


def test_a_program_that_says_nothing_is_ended(monkeypatch, caplog):
    """Whatever kept the library out."""
    monkeypatch.setattr(broker, "HELLO_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(b"")
        listener.listen()
        program = subprocess.Popen(["sleep", "100"])
        pidfd = os.pidfd_open(program.pid)
        try:
            Broker(listener, pidfd, name=None, attach=None, user=None, seconds=1).serve()
            assert program.wait(WAIT_S) == -signal.SIGKILL
        finally:
            program.kill()
            program.wait()
            os.close(pidfd)
        listener.shutdown(socket.SHUT_RDWR)
    assert "runs without the library" in caplog.text


@pytest.mark.usefixtures("placement")
def test_who_waits_outlives_its_receiver(tmp_path, unique_name, mapper):
    """A page is waited for while the receiver dies and is resumed."""
    receiver = Receiver(tmp_path, unique_name, keep=False)
    with receiver, open_source(connect(receiver.uri()), ORACLE) as source:
        source.begin()
        source.wait_switched()
        with Mapper(mapper, *named(receiver)) as program:
            program.do("open", 0, shm.ROOT / f"{unique_name}.pc.ram")
            program.do("map", 0, 0, 0, SIZE, "shared")
            program.say("read", 0, MISSING[3] * PAGE_BYTES)
            assert source.request() == (0, MISSING[3])
            os.kill(receiver.pid, signal.SIGKILL)
            receiver._started().wait(WAIT_S)
            successor = Successor(tmp_path, unique_name, control=True, keep=False)
            with successor, contextlib.closing(Control(successor.control_path)) as control:
                control.wait_status("postcopy-paused")
                uri = f"unix:{tmp_path / 'again'}"
                assert control.execute("migrate-recover", uri=uri) == {}
                with contextlib.closing(connect(uri)) as sock:
                    source.resume(sock)
                    source.end()
                    assert program.hear() == f"ok {ORACLE.page(0, MISSING[3], DIRTIED)[0]}"
                    assert successor.finish().info["status"] == "completed"
            visit(program, 0, tmp_path)


def test_a_program_that_dies_is_forgotten(tmp_path, unique_name, mapper):
    with switched(tmp_path, unique_name, keep=False) as (receiver, source, ram):
        with Mapper(mapper, *named(receiver)) as program:
            program.do("open", 0, ram)
            program.do("map", 0, 0, 0, SIZE, "shared")
            program.say("read", 0, MISSING[0] * PAGE_BYTES)
            wait_until(lambda: source.source.back.requests, "its fault", WAIT_S)
        wait_until(lambda: not attached(unique_name), "its end", WAIT_S)
        with source.postcopy():
            pass
        assert receiver.finish().info["status"] == "completed"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), 2, "the program is missing"),
        (("--", "no-such-program"), 3, "'no-such-program' is not there"),
        (("--name", "a/b", "--", "true"), 2, "receiver name 'a/b'"),
        (("--user", "no such user", "--", "true"), 2, "there is no such user"),
    ],
)
def test_what_is_wrong_with_the_command(arguments, code, text):
    done = subprocess.run([*GUEST, *arguments], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == code and text in done.stderr


def test_the_program_is_the_process(tmp_path):
    """Its number, its descriptors, its exit code."""
    reading, writing = os.pipe()
    script = f"echo $$ >/dev/fd/{writing}; exit 7"
    command = [*GUEST, "--", "sh", "-c", script]
    process = subprocess.Popen(command, pass_fds=[writing])
    os.close(writing)
    with os.fdopen(reading) as said:
        assert int(said.read()) == process.pid  # to its end: nobody else holds the pipe
    assert process.wait(WAIT_S) == 7
