"""Real vhost-user back-ends under `sharded-pc guest`: disks and files are read and written while
the pages for it, and the queues that say so, are still at the source."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sharded_pc import shm
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from tests.mapper import GUEST
from tests.preload_kit import MIB, WAIT_S, Source
from tests.qemu import wait_until
from tests.receiver import Receiver
from tests.vhost_user import FrontEnd, Overlaid, Queue, RefusedError, halves

pytestmark = [pytest.mark.qemu, pytest.mark.uffd]

STORAGE_DAEMON = shutil.which("qemu-storage-daemon")
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
SIZE = 8 * MIB
REGIONS = halves(SIZE)
AT = 1100
"""The queue's first page, in the upper half."""
REQUESTS = 60
SECTOR = 512
RATE = 2 * MIB


class Requests:
    """A queue whose requests have their data's pages anywhere in the RAM; `content` is what is to
    be read."""

    def __init__(self) -> None:
        chance = random.Random(3)
        self.queue = Queue(AT, REGIONS)
        self.content = chance.randbytes(REQUESTS * PAGE_BYTES)
        pages = [page for page in range(SIZE // PAGE_BYTES) if not AT <= page < AT + 4]
        chance.shuffle(pages)
        self._pages = pages
        self.read: dict[int, int] = {}
        """pages of the content to pages of the RAM that they come to"""
        self.written: dict[int, int] = {}
        self.count = 0

    def page(self) -> int:
        return self._pages.pop()

    def add(self, *parts: tuple[int, int, bool]) -> None:
        self.queue.request(*parts)
        self.count += 1

    def oracle(self) -> Overlaid:
        # all of the RAM is missing after the switch
        blocks = (RamBlock("pc.ram", SIZE), RamBlock("rom", 64 << 10))
        return Overlaid(blocks, seed=5, dirty_share=1.0, overlay=self.queue.overlay())

    def check(self, oracle: Overlaid, ram: bytes, written: bytes) -> None:
        for number, page in self.read.items():
            assert page_of(ram, page) == page_of(self.content, number), (number, page)
        for number, page in self.written.items():
            sent = oracle.page(0, page, oracle.final(0)[page])
            assert page_of(written, number) == sent, (number, page)


def page_of(data: bytes, page: int) -> bytes:
    return data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]


@contextlib.contextmanager
def back_end(command: Sequence[object], **options: object) -> Iterator[subprocess.Popen]:
    words = [str(word) for word in command]
    process = subprocess.Popen(words, start_new_session=True, **options)
    try:
        yield process
        process.terminate()
        process.wait(WAIT_S)
    finally:  # one that waits for a page hears nothing else; its children are as deaf
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(WAIT_S)


def migrate(
    folder: Path, name: str, requests: Requests, where: Path, number: int, *, slots: bool = False
) -> tuple[Overlaid, bytes]:  # fmt: skip
    """The back-end at `where` serves the requests meanwhile; the RAM at the end."""
    oracle = requests.oracle()
    with Receiver(folder, name) as receiver, FrontEnd(where) as front:
        front.set_up()
        with Source(receiver, oracle, RATE) as source:
            source.switch()
            ram = shm.ROOT / source.files()[0]
            with source.postcopy():
                token = os.open(ram, os.O_PATH)  # as QEMU sends it (preload/hold.c)
                front.share(token, REGIONS, slots=slots)
                os.close(token)
                front.start(number, requests.queue)
                requests.queue.wait_used(ram, requests.count)
            assert source.source.requested_pages > 10
        assert receiver.finish().info["status"] == "completed"
        return oracle, receiver.segment_bytes("pc.ram")


# --- qemu-storage-daemon ---


def storage_daemon(folder: Path, aio: str) -> list[object]:
    cache = "off" if aio == "threads" else "on"
    return [
        STORAGE_DAEMON,
        "--blockdev",
        f"driver=file,node-name=disk,filename={folder}/disk,aio={aio},cache.direct={cache}",
        "--export",
        f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={folder}/blk,"
        "writable=on",
    ]


def disk_requests() -> Requests:
    """Of virtio-blk: half of the pages are read, half are written over."""
    requests = Requests()
    for number in range(REQUESTS):
        write, page = number % 2, requests.page()
        (requests.written if write else requests.read)[number] = page
        head = struct.pack("=IIQ", write, 0, number * PAGE_BYTES // SECTOR)
        requests.add(
            (requests.queue.small(head), len(head), False),
            (page * PAGE_BYTES, PAGE_BYTES, not write),
            (requests.queue.small(b"\xff"), 1, True),
        )
    return requests


@pytest.mark.skipif(STORAGE_DAEMON is None, reason="no qemu-storage-daemon: install qemu-utils")
class TestDisk:
    @pytest.mark.parametrize(
        ("aio", "slots"), [("threads", True), ("native", False), ("io_uring", False)]
    )
    def test_missing_pages(self, tmp_path, unique_name, aio, slots, request):
        """Read and written by a thread's calls, and by the kernel itself, into and out of pages
        that are not there."""
        placement = "copy" if aio == "native" else "continue"
        request.getfixturevalue("monkeypatch").setattr(
            "tests.receiver.PLACEMENT", ("--placement", placement)
        )
        requests = disk_requests()
        disk = tmp_path / "disk"
        disk.write_bytes(requests.content)
        name = ("--name", unique_name, "--attach", tmp_path / f"{unique_name}.attach")
        with back_end([*GUEST, *name, "--", *storage_daemon(tmp_path, aio)]):
            wait_until((tmp_path / "blk").exists, "the back-end", WAIT_S)
            oracle, ram = migrate(tmp_path, unique_name, requests, tmp_path / "blk", 0, slots=slots)
        requests.check(oracle, ram, disk.read_bytes())

    def test_not_a_guest(self, tmp_path, unique_name):
        """It is told so, and reads no zeros."""
        requests = disk_requests()
        (tmp_path / "disk").write_bytes(requests.content)
        with back_end(storage_daemon(tmp_path, "threads"), stderr=subprocess.DEVNULL):
            wait_until((tmp_path / "blk").exists, "the back-end", WAIT_S)
            with pytest.raises(RefusedError):
                ram = shm.ROOT / f"{unique_name}.ram"
                ram.write_bytes(b"\0" * SIZE)
                token = os.open(ram, os.O_PATH)
                try:
                    with FrontEnd(tmp_path / "blk") as front:
                        front.set_up()
                        front.share(token, REGIONS)
                finally:
                    os.close(token)
                    ram.unlink()


# --- virtiofsd ---

INIT, LOOKUP, OPEN, READ, WRITE, CREATE = 26, 1, 14, 15, 16, 35
"""FUSE (linux/fuse.h)"""
ROOT, FIRST, SECOND = 1, 2, 3
"""virtiofsd numbers what it finds in order."""


class Files(Requests):
    """A file "read", and one "written" that is made, by FUSE's requests in order."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[tuple[int, int]] = []
        self._fuse(INIT, 0, struct.pack("=IIII", 7, 31, 0, 0), 64)
        self._fuse(LOOKUP, ROOT, b"read\0", 128)
        self._fuse(OPEN, FIRST, struct.pack("=II", os.O_RDONLY, 0), 16)
        for number in range(16):
            self.read[number] = self.page()
            self._fuse(READ, FIRST, self._span(0, number, 40), 0, to=self.read[number])
        made = struct.pack("=IIII", os.O_RDWR | os.O_CREAT, 0o644, 0, 0) + b"written\0"
        self._fuse(CREATE, ROOT, made, 144)
        for number in range(16):
            self.written[number] = self.page()
            self._fuse(WRITE, SECOND, self._span(1, number, 40), 8, of=self.written[number])

    @staticmethod
    def _span(handle: int, page: int, size: int) -> bytes:
        head = struct.pack("=QQI", handle, page * PAGE_BYTES, PAGE_BYTES)
        return head.ljust(size, b"\0")

    def _fuse(
        self, code: int, node: int, arguments: bytes, answer: int, *, of: int = -1, to: int = -1
    ) -> None:  # fmt: skip
        """`of`: a page that is sent, `to`: one that is answered into."""
        size = 40 + len(arguments) + (PAGE_BYTES if of >= 0 else 0)
        head = struct.pack("=IIQQIIII", size, code, len(self.answers) + 1, node, 0, 0, 0, 0)
        parts = [(self.queue.small(head), 40, False)]
        parts.append((self.queue.small(arguments), len(arguments), False))
        if of >= 0:
            parts.append((of * PAGE_BYTES, PAGE_BYTES, False))
        out = self.queue.small(b"\xff" * 16)
        self.answers.append((out, 16 + answer + (PAGE_BYTES if to >= 0 else 0)))
        parts.append((out, 16, True))
        if answer:
            parts.append((self.queue.small(bytes(answer)), answer, True))
        if to >= 0:
            parts.append((to * PAGE_BYTES, PAGE_BYTES, True))
        self.add(*parts)

    def check_answers(self, ram: bytes) -> None:
        for number, (at, size) in enumerate(self.answers):
            assert struct.unpack_from("=IiQ", ram, at) == (size, 0, number + 1)


@pytest.mark.skipif(not VIRTIOFSD.exists(), reason="n/a: this system's QEMU has no virtiofsd")
@pytest.mark.skipif(os.geteuid() != 0, reason="n/a: its sandboxes need root")
@pytest.mark.parametrize("sandbox", ["namespace", "chroot"])
def test_files(tmp_path, unique_name, sandbox, monkeypatch):
    """Within its sandbox, with its filter of system calls, on a socket that it is given: as libvirt
    starts it."""
    placement = "copy" if sandbox == "chroot" else "continue"
    monkeypatch.setattr("tests.receiver.PLACEMENT", ("--placement", placement))
    requests, folder = Files(), tmp_path / "share"
    folder.mkdir()
    (folder / "read").write_bytes(requests.content)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "fs"))
        listener.listen()
        fd = listener.fileno()
        options = ["-o", f"source={folder}", "-o", f"sandbox={sandbox}", "-o", "log_level=err"]
        name = ("--name", unique_name, "--attach", tmp_path / f"{unique_name}.attach")
        command = [*GUEST, *name, "--", VIRTIOFSD, f"--fd={fd}", *options]
        with back_end(command, pass_fds=[fd], stderr=subprocess.DEVNULL):
            listener.close()
            oracle, ram = migrate(tmp_path, unique_name, requests, tmp_path / "fs", 1)
    requests.check_answers(ram)
    requests.check(oracle, ram, (folder / "written").read_bytes())
