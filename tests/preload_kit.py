"""Who a process under the preload library meets: a test that drives it, a source, a fake receiver.

``Client``        the process: tests/native/preload_client.c
``Source``        a synthetic source for a real receiver, taken through a migration step by step
``FakeReceiver``  a socket that plays the receiver's lines, for what a real one never says, or not
                  when a test wants it to
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sharded_pc import shm
from sharded_pc.attach import preload, protocol
from sharded_pc.geometry import PAGE_BYTES, Geometry, RamBlock
from sharded_pc.native.uffd import Uffd
from sharded_pc.source import SyntheticSource
from sharded_pc.testing.oracle import PageOracle
from sharded_pc.transport import fds
from tests.qemu import wait_until
from tests.receiver import Receiver

WAIT_S = 20.0
MIB = 1 << 20
PONG_RUNNING = 4
EXIT_HOST = 3
HERE = Path(__file__).parent
NATIVE = HERE.parent / "sharded_pc" / "native"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/preload_client.c"""
    path = tmp_path_factory.mktemp("preload") / "client"
    apart = ("binding.c", "main.c")
    core = [source for source in NATIVE.glob("**/*.c") if source.name not in apart]
    sources = [HERE / "native/preload_client.c", *core]
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]
    subprocess.run(["cc", *flags, f"-I{NATIVE}", "-o", path, *sources, "-pthread"], check=True)
    return path


@contextlib.contextmanager
def ram_file(path: Path, size: int) -> Iterator[Path]:
    with path.open("xb") as file:
        file.truncate(size)
    try:
        yield path
    finally:
        path.unlink()


@pytest.fixture
def ram(unique_name: str) -> Iterator[list[Path]]:
    """Two RAM files; of two stripes and a page, and of one page."""
    with contextlib.ExitStack() as stack:
        sizes = {"ram": 2 * MIB * 2 + 4096, "rom": 4096}
        yield [
            stack.enter_context(ram_file(shm.ROOT / f"{unique_name}.{name}", size))
            for name, size in sizes.items()
        ]


@pytest.fixture
def fake(tmp_path: Path, ram: list[Path]) -> Iterator[FakeReceiver]:
    with FakeReceiver(tmp_path / "attach", ram) as receiver:
        yield receiver


def guest_of(fake: FakeReceiver, ram: Sequence[Path], **options: Any) -> dict[str, str]:
    return preload.environment(str(fake.path), [path.name for path in ram], **options)


class Client:
    """The program under the library, doing what ``words`` say; a context manager that kills it."""

    def __init__(self, program: Path, environment: dict[str, str], *words: object) -> None:
        self.process = subprocess.Popen(
            [program, *map(str, words)], env={**os.environ, **environment}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said: list[str] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def hear(self) -> str:
        """Its next line; "" at the end."""
        line = self.process.stdout.readline().rstrip("\n")
        self.said.append(line)
        return line

    def go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self, code: int = 0, error: str = "") -> list[str]:
        """Waits for its end; the lines it printed. ``error`` is all it may say on stderr, a
        pattern."""
        out, err = self.process.communicate(timeout=WAIT_S)
        assert self.process.returncode == code, err
        assert re.fullmatch(error, err), err
        return [*self.said, *out.splitlines()]


def complaint(pattern: str) -> str:
    """The one line that the library may print."""
    return rf"sharded_pc preload: {pattern}\n"


class Source:
    """The synthetic source, gone through set-up only; a context manager."""

    def __init__(self, receiver: Receiver, pages: PageOracle, bandwidth: float | None) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(receiver.uri().removeprefix("unix:"))
        self.source = SyntheticSource(self._sock, pages, bandwidth=bandwidth)
        self.source.set_up()
        self._receiver, self._blocks = receiver, pages.blocks
        wait_until(self._defined, "the RAM files", WAIT_S)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def files(self) -> list[str]:
        """The RAM files' names, in block order."""
        names = [shm.block_segment_name(self._receiver.name, b.name) for b in self._blocks]
        return [name.removeprefix("/") for name in names]

    def _defined(self) -> bool:
        sizes = {b.name: b.size for b in self._blocks}
        with contextlib.suppress(FileNotFoundError):
            return [(shm.ROOT / f).stat().st_size for f in self.files()] == [*sizes.values()]
        return False

    def switch(self) -> None:
        """Precopy, and the switch; returns when the guest may run."""
        self.source.precopy()
        self.source.switch()
        self.wait_running()

    def wait_running(self) -> None:
        wait_until(lambda: PONG_RUNNING in self.source.back.pongs, "the switch", WAIT_S)

    @contextlib.contextmanager
    def postcopy(self) -> Iterator[None]:
        """Postcopy and the end, in the background of the block."""
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self.source.postcopy()
                self.source.finish()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        except BaseException:
            self._sock.close()
            raise
        finally:
            thread.join(WAIT_S)
        assert not errors and not thread.is_alive(), errors


class FakeReceiver:
    """A fake: says the receiver's lines on a real socket; a context manager."""

    def __init__(self, path: Path, ram: Sequence[Path]) -> None:
        self.path, self._ram = path, ram
        self._listen()

    def _listen(self) -> None:
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.settimeout(WAIT_S)
        self._server.bind(str(self.path))
        self._server.listen()

    def __enter__(self) -> FakeReceiver:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self.path.unlink(missing_ok=True)

    def offer(self, **changes: Any) -> dict:
        # a name that JSON escapes, and one that is long
        names = ['pc "ü\\', "r" * 255]
        blocks = tuple(
            RamBlock(name, path.stat().st_size) for name, path in zip(names, self._ram, strict=True)
        )
        message = protocol.geometry("fake", Geometry(blocks, 2, 2 * MIB), "missing")
        message["geometry"] |= changes
        return message

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        """The next client's."""
        sock, _ = self._server.accept()
        sock.settimeout(WAIT_S)
        inbox = fds.Inbox()
        try:
            yield Connection(sock, inbox, self._ram)
        finally:
            inbox.close()
            sock.close()

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """Nobody listens in the block."""
        self._server.close()
        self.path.unlink()
        yield
        self._listen()


class Connection:
    def __init__(self, sock: socket.socket, inbox: fds.Inbox, ram: Sequence[Path]) -> None:
        self._sock, self._inbox, self._ram = sock, inbox, ram

    def hear(self) -> Any:
        return fds.receive_message(self._sock, self._inbox)

    @property
    def heard_fds(self) -> list[int]:
        """The descriptors that came; closed with the connection."""
        return self._inbox.fds

    def say(self, message: object, with_ram: bool | int = False) -> None:
        """``with_ram``: with the files' descriptors; a number: with the first's, so many times."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("r+b")).fileno() for path in self._ram]
            several = [files[0]] * with_ram if with_ram > 1 else files
            fds.send(self._sock, message, several if with_ram else [])

    def say_bytes(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._sock.sendall(data)

    def say_slowly(self, message: object) -> None:
        """The descriptors with the first byte; every byte by itself."""
        data = fds.encode(message)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("r+b")) for path in self._ram]
            socket.send_fds(self._sock, [data[:1]], [file.fileno() for file in files])
        for byte in data[1:]:
            self._sock.sendall(bytes([byte]))

    def attach(self, offer: dict, *, slowly: bool = False) -> dict:
        """A whole hand-over; the addresses."""
        assert self.hear() == protocol.attach()
        self.say_slowly(offer) if slowly else self.say(offer, with_ram=True)
        addresses = self.hear()["mappings"]["addresses"]
        self.say({"attached": {"guest": 0}})
        return addresses


def place_where_it_waits(uffd: int, content: bytes) -> int:
    """Waits for a fault and places the page there; the fault's address."""
    fault = int.from_bytes(os.read(uffd, 32)[16:24], "little")
    page = fault - fault % PAGE_BYTES
    source = ctypes.create_string_buffer(content, PAGE_BYTES)
    receiver_end = Uffd(uffd)
    receiver_end.copy(page, ctypes.addressof(source), PAGE_BYTES)
    receiver_end.wake(page, PAGE_BYTES)
    return fault
