"""``sharded-pc receive`` as a real process, for tests.

A test starts a ``Receiver`` with a ``with`` block, lets a source migrate to ``receiver.uri()``, and
takes the ``Outcome``. Every wait has a timeout and fails with all that the receiver has said. What
a receiver must not leave behind is looked for when it has ended, and again at the end of the block.

All processes that descend from a receiver carry ``MARK=<its name>`` in their environment, which is
how they are found when their parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_pc import runtime_folder
from tests.control import Control
from tests.qemu import WaitTimeout, wait_until

MARK = "SHARDED_PC_TEST_RECEIVER"
SHM = Path("/dev/shm")
START_S = 20.0
END_S = 30.0
GONE_S = 5.0
"""A killed receiver's workers notice that their pipe is closed within this."""


class ReceiverError(AssertionError):
    """The receiver did not do what a test waited for; the text holds all it has said."""


@dataclass(frozen=True)
class Outcome:
    """``info`` is the JSON object on stdout, None if the receiver printed nothing."""

    exit_code: int
    info: dict[str, Any] | None
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that report an error; a pause is none."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("sharded-pc: ")]
        return [line for line in lines if not line.startswith("sharded-pc: WARNING: paused: ")]


PLACEMENT: tuple[str, ...] = ()
"""Options of receivers before those that a test gives; the fixture `placement` sets it."""


class Receiver:
    """One receiver; a context manager.

    ``incoming`` defaults to a Unix socket in ``folder``. ``keep`` leaves the RAM for
    ``segment_bytes`` until the block ends. ``prefix`` is a command that execs the receiver's;
    ``pass_fds`` are descriptors it inherits.
    """

    word = "receive"
    program: Sequence[str] = (sys.executable, "-m", "sharded_pc")

    def __init__(
        self,
        folder: Path,
        name: str,
        incoming: str | None = None,
        *options: str,
        keep: bool = True,
        control: bool = False,
        pass_fds: Sequence[int] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        self.folder, self.name, self.keep = folder, name, keep
        self.incoming = incoming or f"unix:{self._path('mig')}"
        self.attach_path = self._path("attach")
        self.control_path = self._path("control")
        self._options = [*PLACEMENT, *options, *(["--keep"] if keep else [])]
        self._options += ["--control", str(self.control_path)] if control else []
        self._pass_fds, self._prefix = tuple(pass_fds), list(prefix)
        self._process: subprocess.Popen[bytes] | None = None
        self._outcome: Outcome | None = None

    def __enter__(self) -> Receiver:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._started().pid

    def command(self, *more: str) -> list[str]:
        """The whole command line, with ``more`` options (``--status-fd``)."""
        ours = ["--name", self.name, *self.socket_options(), "--json", "--no-progress"]
        python = [*self.program, self.word, self.incoming]
        return [*self._prefix, *python, *ours, *self._options, *more, *self.behind_options()]

    def socket_options(self) -> list[str]:
        return ["--attach", str(self.attach_path)]

    def behind_options(self) -> list[str]:
        return []

    def runtime_folder(self) -> Path:
        """Where sockets stand that have no path of their own."""
        return runtime_folder.places(self.name)[0]

    def environment(self) -> dict[str, str]:
        return {**os.environ, MARK: self.name}

    def start(self) -> Receiver:
        """Starts it and waits until a source may connect."""
        reading, writing = os.pipe()
        try:
            self._spawn(writing)
            os.close(writing)
            self._wait_listening(reading)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(reading)
        return self

    def uri(self, timeout: float = START_S) -> str:
        """What the source is told to migrate to; with tcp's real port."""
        pattern = re.compile(r"^listening on (\S+)$", re.MULTILINE)
        found = wait_until(lambda: pattern.search(self.stderr()), "the address", timeout)
        return found[1]

    def finish(self, timeout: float = END_S) -> Outcome:
        """Waits for its end; asserts that it left nothing but, with ``keep``, the RAM."""
        if self._outcome is None:
            try:
                code = self._started().wait(timeout)
            except subprocess.TimeoutExpired:
                raise self.error(f"still runs after {timeout:g} s") from None
            self._outcome = Outcome(code, self._json(), self.stderr())
            self._check_end(self._outcome)
        return self._outcome

    def give_up(self) -> Outcome:
        """As an operator who does not wait for the source any more, once it is paused."""
        with contextlib.closing(Control(self.control_path)) as control:
            control.wait_status("postcopy-paused")
            assert control.execute("quit") == {}
        return self.finish()

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self._started().send_signal(number)

    def segment_bytes(self, block: str) -> bytes:
        """The content of a block, found by the JSON's ``shm``."""
        assert self._outcome and self._outcome.info, "there is no JSON yet"
        (path,) = (b["shm"] for b in self._outcome.info["blocks"] if b["name"] == block)
        return (SHM / path.removeprefix("/")).read_bytes()

    def ram(self) -> dict[str, bytes]:
        """{block name: content} of all blocks."""
        assert self._outcome and self._outcome.info, "there is no JSON yet"
        return {b["name"]: self.segment_bytes(b["name"]) for b in self._outcome.info["blocks"]}

    def status(self) -> dict[str, Any]:
        """What an onlooker sees: ``sharded-pc status NAME --json``."""
        command = [sys.executable, "-m", "sharded_pc", "status", self.name, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise self.error(f"status: {done.stderr}")
        return json.loads(done.stdout)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stderr(self) -> str:
        return self._read("stderr")

    def close(self) -> None:
        """Kills it if it lives, removes what ``--keep`` left, asserts that nothing is left."""
        ended = not self.alive()
        if self._process:
            self._process.kill()
            self._process.wait()
        wait_until(lambda: not self.processes(), f"the end of {self.name}'s processes", GONE_S)
        self._clean()
        if ended:
            assert not self.segments(), f"left in {SHM}: {self.segments()}"
        self._remove_leftovers()

    def segments(self) -> list[str]:
        """The names of its files in shared memory."""
        own = re.compile(rf"{re.escape(self.name)}[.%]")
        return sorted(name for name in os.listdir(SHM) if own.match(name))

    def processes(self) -> list[int]:
        """It and all that it started, directly or not, and that still run."""
        return marked_processes(MARK, self.name)

    def error(self, text: str) -> ReceiverError:
        """A ``ReceiverError`` that tells all we know."""
        lines = [f"receiver {self.name}: {text}", f"command: {' '.join(self.command())}"]
        lines += [f"stderr: {self.stderr()[-4000:]}", f"stdout: {self._read('stdout')[-2000:]}"]
        return ReceiverError("\n".join(lines))

    def _spawn(self, status_fd: int) -> None:
        command = self.command("--status-fd", str(status_fd))
        with self._path("stdout").open("wb") as out, self._path("stderr").open("wb") as err:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                pass_fds=(*self._pass_fds, status_fd), env=self.environment(),
            )  # fmt: skip

    def _wait_listening(self, status_fd: int) -> None:
        readable, _, _ = select.select([status_fd], [], [], START_S)
        if not readable:
            raise self.error(f"does not listen after {START_S:g} s")
        if not os.read(status_fd, 1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._started().wait(END_S)
            raise self.error(f"ended with {self._started().poll()} before it listened")

    def _json(self) -> dict[str, Any] | None:
        text = self._read("stdout")
        if text.count("\n") != text.endswith("\n"):
            raise self.error("more than one line on stdout")
        return json.loads(text) if text else None

    def _check_end(self, outcome: Outcome) -> None:
        if found := re.search(r"Traceback|resource_tracker|Exception ignored", outcome.stderr):
            raise self.error(f"stderr holds {found[0]!r}")
        try:
            wait_until(lambda: not self.processes(), "the end of its processes", GONE_S)
        except WaitTimeout as error:
            raise self.error(f"{error}: {describe(self.processes())}") from None
        if sockets := [p for p in self._sockets() if p.exists()]:
            raise self.error(f"left sockets {sockets}")
        if self.runtime_folder().exists():
            raise self.error(f"left {self.runtime_folder()}")
        kept = self.keep and outcome.info and outcome.info["status"] == "completed"
        allowed = self._kept_segments(outcome.info) if kept else []
        if self.segments() != allowed:
            raise self.error(f"left {self.segments()} in {SHM}, expected {allowed}")

    def _kept_segments(self, info: dict[str, Any]) -> list[str]:
        blocks = [block["shm"].removeprefix("/") for block in info["blocks"]]
        return sorted([f"{self.name}%control", *blocks])

    def _sockets(self) -> list[Path]:
        incoming = [Path(self.incoming[5:])] if self.incoming.startswith("unix:") else []
        return [self.attach_path, self.control_path, *incoming]

    def _clean(self) -> None:
        command = [sys.executable, "-m", "sharded_pc", "clean", "--kept", "--resumable"]
        command += ["--name", self.name]
        if self.segments():
            subprocess.run(
                command,
                check=True,
                stdout=subprocess.DEVNULL,
                timeout=START_S,
                env=self.environment(),
            )

    def _remove_leftovers(self) -> None:
        """After a failed test, so that the next one starts afresh."""
        for path in [*(SHM / name for name in self.segments()), *self._sockets()]:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.runtime_folder(), ignore_errors=True)

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    def _read(self, suffix: str) -> str:
        path = self._path(suffix)
        return path.read_text(errors="replace") if path.exists() else ""

    def _started(self) -> subprocess.Popen[bytes]:
        assert self._process, f"{self.name} is not started"
        return self._process


class Resumes:
    """Makes a receiver's class that of a dead one's successor: `--resume NAME` instead of an
    address, in the same folder and with the same sockets."""

    def command(self, *more: str) -> list[str]:
        words = super().command(*more)
        at = words.index("--name")
        words[at] = "--resume"
        words.remove(self.incoming)
        return words[: words.index("--")] if "--" in words else words


class Successor(Resumes, Receiver):
    """`receive --resume NAME`."""


def marked_processes(variable: str, value: str) -> list[int]:
    """Processes (not zombies) that were started with ``variable=value`` in their environment."""
    mark = f"{variable}={value}".encode()
    return [pid for pid, environment in _environments() if mark in environment.split(b"\0")]


def describe(pids: Sequence[int]) -> list[str]:
    """``pid: command line`` of each that still lives."""
    lines = []
    for pid in pids:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            lines.append(f"{pid}: {command.decode(errors='replace')}")
    return lines


def _environments() -> Iterator[tuple[int, bytes]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                yield int(entry), Path(f"/proc/{entry}/environ").read_bytes()


# --- a guest in a process of its own: a thread that waits for a page holds Python's GIL ---


class Toucher:
    """A Python guest, ``sharded_pc.attach``, that touches random pages while they arrive.

    It attaches at once and reads ``throttled`` pages of ``block``, one by one, then, once
    ``go_on()`` was called, ``more`` pages, each of which it also marks if ``writes``. It ends when
    the receiver has all pages. Nothing is read twice. ``number`` tells a receiver's guests apart.
    """

    def __init__(
        self, receiver: Receiver, block: str = "pc.ram", *, throttled: int = 12, more: int = 200,
        writes: bool = False, number: int = 0,
    ) -> None:  # fmt: skip
        self._receiver = receiver
        self._base = receiver.folder / f"{receiver.name}.guest{number}"
        plan = [str(receiver.attach_path), receiver.name, block, str(self._base)]
        plan += [str(throttled), str(more), str(int(writes))]
        with self._file("stderr").open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.receiver", *plan], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=err, cwd=Path(__file__).parents[1],
                bufsize=0,
            )  # fmt: skip

    def __enter__(self) -> Toucher:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def wait_ready(self, timeout: float = END_S) -> dict[str, Any]:
        """Waits until its memory may be touched; the receiver's figures at that moment."""
        return self._say(timeout)

    def wait_touched(self, timeout: float = END_S) -> dict[str, Any]:
        """Waits until it has read its first pages; the receiver's figures then."""
        return self._say(timeout)

    def wait_written(self, timeout: float = END_S) -> dict[str, Any]:
        """Waits until it has touched its last page; the receiver's figures then."""
        return self._say(timeout)

    def go_on(self) -> None:
        self._process.stdin.write(b"\n")

    def finish(self, timeout: float = END_S) -> dict[int, bytes]:
        """Waits for its end; {page number: the page as it was read}."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._receiver.error(f"its guest hangs: {self._stderr()}") from None
        assert code == 0, f"the guest ended with {code}: {self._stderr()}"
        raw = self._file("pages").read_bytes()
        records = [raw[at : at + 4104] for at in range(0, len(raw), 4104)]
        return {int.from_bytes(record[:8], "big"): record[8:] for record in records}

    def _say(self, timeout: float) -> dict[str, Any]:
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise self._receiver.error(f"its guest says nothing: {self._stderr()}")
        return json.loads(line)

    def _stderr(self) -> str:
        return self._file("stderr").read_text()[-2000:]

    def _file(self, suffix: str) -> Path:
        return Path(f"{self._base}.{suffix}")


MARKED = b"written by the guest"


def _touch(arguments: Sequence[str]) -> None:
    import random

    import sharded_pc
    from sharded_pc.observe.view import ReceiverView

    path, name, block, base = arguments[:4]
    throttled, more, writes = map(int, arguments[4:])

    def say() -> None:
        with ReceiverView(name) as view:
            print(json.dumps(view.info()), flush=True)

    with sharded_pc.attach(path, timeout=END_S) as guest, open(f"{base}.pages", "wb") as out:
        say()
        view = guest.blocks[block]
        wanted = min(throttled + more, len(view) // 4096)
        pages = random.Random(base).sample(range(len(view) // 4096), wanted)
        for count, page in enumerate(pages):
            if count == throttled:
                say()
                sys.stdin.readline()
            out.write(page.to_bytes(8, "big") + bytes(view[page * 4096 : page * 4096 + 4096]))
            if writes:
                view[page * 4096 : page * 4096 + len(MARKED)] = MARKED
        say()
        guest.wait(END_S)


if __name__ == "__main__":
    _touch(sys.argv[1:])
