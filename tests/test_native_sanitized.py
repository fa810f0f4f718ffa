"""The C core by itself: compiled with the sanitizers and all warnings, and run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from sharded_pc.native.multifd import can_unpack
from sharded_pc.wire.multifd import Flag

NATIVE = Path(__file__).parent.parent / "sharded_pc" / "native"
GUEST = NATIVE.parent / "attach" / "guest"
PROGRAM = NATIVE.parent / "attach" / "program"
TESTS = Path(__file__).parent / "native"
SECONDS = 100

CORE = sorted(set(NATIVE.glob("**/*.c")) - {NATIVE / "binding.c", NATIVE / "child" / "main.c"})
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)
ZLIB = ("-DSP_HAVE_ZLIB", "-lz") if can_unpack(Flag.ZLIB) else ()
# The thread sanitizer of older compilers cannot live with much address randomisation.
FIXED = ["setarch", "-R"] if shutil.which("setarch") else []
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def run(command: list[str | Path]) -> None:
    """The command, its output shown if it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}")


def build(
    program: Path,
    sanitizer: tuple[str, ...],
    sources: tuple[str, ...],
    without: tuple[str, ...] = (),
    core: Sequence[Path] = CORE,
) -> Path:
    """``without``: parts of the core that the program plays itself."""
    own = [TESTS / f"{name}.c" for name in sources]
    core = [source for source in core if source.stem not in without]
    flags = ["-std=gnu11", "-g", "-O1", *WARNINGS, *sanitizer, "-pthread"]
    run(["cc", *flags, f"-I{NATIVE}", f"-I{TESTS}", "-o", program, *own, *core, *ZLIB])
    return program


def test_undefined_behaviour_and_memory(tmp_path: Path) -> None:
    """Every suite under the address and the undefined-behaviour sanitizer, leaks included."""
    pages = ("stream", "pages", "encoded", "straight")
    sources = ("test_core", "world", "shared", *pages, "return_path", "multifd")
    run([build(tmp_path / "test_core", ADDRESS, sources)])


def test_threads(tmp_path: Path) -> None:
    """What threads share, under the thread sanitizer."""
    run([*FIXED, build(tmp_path / "test_threads", THREAD, ("test_threads", "world"))])


def test_channels_of_multifd(tmp_path: Path) -> None:
    """Channels and the main channel's meetings, under the thread sanitizer."""
    run([*FIXED, build(tmp_path / "channels", THREAD, ("test_multifd", "multifd", "world"))])


def test_guests_that_change_meanwhile(tmp_path: Path) -> None:
    """The kernel's part is the program's, so that a guest can come in the middle of a call."""
    without = ("uffd", "fault", "place", "worker", "ahead", "floor")
    run([build(tmp_path / "test_guests", ADDRESS, ("test_guests", "world"), without)])


def test_views_of_a_segment(tmp_path: Path) -> None:
    """What a program has mapped, with every way of cutting it."""
    run([build(tmp_path / "views", ADDRESS, ("test_views",), core=[PROGRAM / "views.c"])])


@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD], ids=["address", "thread"])
def test_the_guests_end(tmp_path: Path, sanitizer: tuple[str, ...]) -> None:
    """A guest's thread with receivers that come and go, and messages that are cut anywhere."""
    sources = sorted(GUEST.glob("*.c"))
    program = build(tmp_path / "guest_end", sanitizer, ("test_guest_end",), core=sources)
    run([*FIXED, program, tmp_path / "socket"])
