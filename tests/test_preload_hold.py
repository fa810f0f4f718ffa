"""What the preload library keeps a process from doing to RAM of which pages are missing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sharded_pc.attach import preload, protocol
from tests.preload_kit import (
    EXIT_HOST,
    Client,
    FakeReceiver,
    complaint,
    fake,
    guest_of,
    place_where_it_waits,
    program,
    ram,
)

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.uffd,
]
PAGE = 4096


def run(
    fake: FakeReceiver, ram: list[Path], program: Path, before: list[object], after: list[object],
    meanwhile: Callable[[], None] = lambda: None, mode: str = "missing", error: str = "",
) -> list[str]:  # fmt: skip
    """The lines of a process that says ``before`` while pages are missing and ``after`` when all
    is here; ``meanwhile`` runs in between."""
    words = ["fixed", ram[0], *before, "say", "done", "wait", "no-uffds", *after]
    with Client(program, guest_of(fake, ram[:1]), *words) as client:
        with fake.connection() as connection:
            connection.attach(fake.offer(mode=mode))
            connection.say(protocol.event(protocol.READY))
            while client.hear() != "done":
                assert client.process.poll() is None, client.finish()
            meanwhile()
            connection.say(protocol.event(protocol.COMPLETED))
        client.go_on()
        return client.finish(0, error)


@pytest.mark.parametrize("how", ["punch", "remove", "dontneed"])
def test_no_page_is_dropped(how: str, fake, ram, program) -> None:
    """Balloon, free page reporting: forgotten while pages are missing, done afterwards."""
    ram[0].write_bytes(b"y" * ram[0].stat().st_size)
    full = ram[0].stat().st_blocks

    def still_there() -> None:
        assert ram[0].stat().st_blocks == full

    words = [how, PAGE, how, 5 * PAGE]
    run(fake, ram, program, words, [how, 0], still_there)
    assert full - ram[0].stat().st_blocks == (0 if how == "dontneed" else 8)


def test_child_reads_nothing(fake, ram, program) -> None:
    """It has no userfaultfd: it would read zeros where a page is missing."""
    lines = run(fake, ram, program, ["dofork", "fork-read", PAGE], ["fork-read", PAGE])
    assert [line for line in lines if line != "done"] == ["signal 11", "child read 0"]
    lines = run(fake, ram, program, ["fork-read", PAGE], ["flags", "fork-read", PAGE])
    assert lines[-1] == "signal 11"  # as the process asked for it itself


@pytest.mark.parametrize("mode", ["missing", "missing+minor"])
def test_no_huge_page_fills_holes(mode: str, fake, ram, program) -> None:
    lines = run(fake, ram, program, ["flags"], ["flags"], mode=mode)
    during, after = (line.split()[1:] for line in lines if line.startswith("flags"))
    if "hg" not in after:
        pytest.skip("n/a: a kernel without transparent huge pages")
    assert "hg" not in during and "dc" in during
    assert ("nh" in during) == (mode == "missing")


def test_ram_is_not_handed_on(fake, ram, program) -> None:
    """As QEMU hands it to a vhost-user back-end, which has no userfaultfd there: that gets a
    descriptor that names the file and cannot be mapped."""
    lines = run(fake, ram, program, ["share"], ["share"])
    assert [line for line in lines if line != "done"] == [os.strerror(errno.EBADF), "mapped"]


WRAPPERS = {
    "sh": ["sh", "-c", '"$0" "$@"; exit $?'],
    "sh-exec": ["sh", "-c", 'test -e / && /bin/true; exec "$0" "$@"'],
    "env": ["env", "SOMETHING=else"],
    "nice": ["nice", "-n", "1"],
    "all": ["nice", "env", "A=b", "sh", "-c", 'echo $(uname) >/dev/null; "$0" "$@"; exit $?'],
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper: str, fake, ram, program) -> None:
    first, *rest = WRAPPERS[wrapper]
    words = [*rest, program, "fixed", ram[0], "read", 5000, "no-uffds"]
    with Client(Path(first), guest_of(fake, ram[:1]), *words) as client:
        with fake.connection() as connection:
            connection.attach(fake.offer())
            connection.say(protocol.event(protocol.READY))
            place_where_it_waits(connection.heard_fds[0], b"w" * PAGE)
            assert client.hear() == str(ord("w"))
            connection.say(protocol.event(protocol.COMPLETED))
        client.finish()


def test_wrapper_without_memory(tmp_path, ram, program) -> None:
    """What is wrong is told by the process that maps, whoever stands in front."""
    environment = preload.environment(str(tmp_path / "none"), [ram[0].name])
    words = ["-c", '"$0" "$@"; exit $?', program, "fixed", ram[0]]
    with Client(Path("sh"), environment, *words) as client:
        client.finish(EXIT_HOST, complaint("attach: connect to .*: No such file or directory"))
