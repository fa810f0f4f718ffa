"""A recorded postcopy stream (`sharded-pc receive --record FILE`), and what stands in it where.

Beside FILE there may be FILE.json, which `python -m benchmarks.record` writes: how a QEMU that can
take the stream is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from sharded_pc.errors import RemoteProtocolError, StreamEnded, UsageError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.wire import events, ram
from sharded_pc.wire.constants import RamFlag
from sharded_pc.wire.reader import StreamReader
from sharded_pc.wire.steps import TELL, Parser, Peek, Some, counted_text, number

RECIPE = "python -m benchmarks.record FILE"
_HEADER = struct.Struct(">Q")
_PAGE = RamFlag.PAGE | RamFlag.CONTINUE
_ZERO = RamFlag.ZERO | RamFlag.CONTINUE


@dataclasses.dataclass(frozen=True, slots=True)
class Qemu:
    """What starts a QEMU that can take the stream, and which one sent it."""

    command: tuple[str, ...]
    environment: dict[str, str]
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    """Sizes and offsets are bytes, counts are pages of 4 KiB."""

    path: str
    size: int
    machine: str
    ram: int
    """of all blocks"""
    setup_end: int
    """offset of what follows the setup section: a source sends no page before it"""
    package_at: int
    """offset of the PACKAGED command: the switch"""
    normal: int
    zero: int
    qemu: Qemu | None = None

    @property
    def payload(self) -> int:
        """Bytes of page content in the stream."""
        return self.normal * PAGE_BYTES


def sidecar(path: str | os.PathLike) -> Path:
    """Where what belongs to a recording is written."""
    return Path(f"{os.fspath(path)}.json")


def write_sidecar(recording: Recording, qemu: Qemu) -> None:
    """Makes the recording one that `--peer qemu` can use."""
    told = dataclasses.asdict(dataclasses.replace(recording, qemu=qemu))
    del told["path"]
    text = json.dumps({key.replace("_", "-"): value for key, value in told.items()}, indent=2)
    sidecar(recording.path).write_text(text + "\n")


def read(path: str | os.PathLike) -> Recording:
    """Reads a recording through, which also brings it into the page cache.

    UsageError: no such file, or no postcopy in it; RemoteProtocolError: not a stream, or not whole.
    """
    path = os.fspath(path)
    try:
        with mapped(path) as data:
            scan = Scan(data)
            scan.run()
    except OSError as error:
        raise UsageError(f"recording {path}: {error.strerror}") from error
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"recording {path}: {error}") from error
    if scan.package_at is None or scan.setup_end is None:
        raise UsageError(f"recording {path}: no postcopy in it; make one with `{RECIPE}`")
    found = Recording(
        path, scan.at, scan.machine, scan.ram, scan.setup_end, scan.package_at, scan.normal,
        scan.zero,
    )  # fmt: skip
    return dataclasses.replace(found, qemu=_read_qemu(found))


@contextlib.contextmanager
def mapped(path: str) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise StreamEnded("it is empty")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            yield data


def _read_qemu(recording: Recording) -> Qemu | None:
    beside = sidecar(recording.path)
    if not beside.exists():
        return None
    try:
        told = json.loads(beside.read_text())
        size, qemu = told["size"], told["qemu"]
        found = Qemu(tuple(qemu["command"]), dict(qemu["environment"]), qemu["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{beside}: not what `{RECIPE}` writes ({error!r})") from error
    if size != recording.size:
        raise UsageError(
            f"{beside} is of another recording: {size} bytes there, {recording.size} here"
        )
    return found


_CONTINUED = object()
"""The scan's wish: pass over all page records that name no block."""


class Scan:
    """Drives the stream's parser over a mapping; page records are passed over, not read.

    `note(header, at)`, if there is one, hears of each page with data: its record's header and where
    its bytes begin; -1 for a page of zeros."""

    note: Callable[[int, int], None] | None = None
    block = ""
    """that the records name"""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.blocks: dict[str, int] = {}
        self._reader = StreamReader(self._records)
        self.at = self.normal = self.zero = 0
        self.machine = ""
        self.setup_end: int | None = None
        self.package_at: int | None = None

    @property
    def ram(self) -> int:
        return sum(self.blocks.values())

    def run(self) -> None:
        parser = self._reader.events()
        answer, began = None, 0
        with contextlib.suppress(StopIteration):
            while True:
                want = parser.send(answer)
                if want is TELL:
                    began = self.at  # a command's start, when its event comes
                answer = self._serve(want, began)
        if self.at != len(self._data):
            raise RemoteProtocolError(f"{len(self._data) - self.at} bytes behind the stream's end")

    def _serve(self, want: object, began: int) -> object:
        match want:
            case int():
                return self._take(want)
            case Some(most):
                return self._take(min(most, len(self._data) - self.at))
            case Peek(size):
                return self._data[self.at : self.at + size]
            case _ if want is TELL:
                return self.at
            case _ if want is _CONTINUED:
                return self._pass_continued()
            case events.Packaged():
                self.package_at = began
            case events.RamSectionEnd("setup"):
                self.setup_end = self.at
            case events.Configuration(machine):
                self.machine = machine
        return None

    def _take(self, size: int) -> bytes:
        if self.at + size > len(self._data):
            raise StreamEnded("the stream ended in the middle", offset=len(self._data))
        self.at += size
        return self._data[self.at - size : self.at]

    def _pass_continued(self) -> None:
        data, at, unpack = self._data, self.at, _HEADER.unpack_from
        normal, zero, last = 0, 0, len(data) - _HEADER.size
        while at <= last:
            header = unpack(data, at)[0]
            kind = header & 0xFFF
            if kind == _PAGE:
                if self.note is not None:
                    self.note(header, at + 8)
                normal += 1
                at += 8 + PAGE_BYTES
            elif kind == _ZERO:
                if self.note is not None:
                    self.note(header, -1)
                zero += 1
                at += 9
            else:
                break
        self.at, self.normal, self.zero = at, self.normal + normal, self.zero + zero

    def _records(self) -> Parser:
        """The records of one section, through EOS."""
        if not self.blocks:
            blocks = yield from ram.first_record(self._reader.page_sizes)
            self.blocks = {block.name: block.size for block in blocks}
        while True:
            yield _CONTINUED
            header = yield from number(8)
            if header & 0xFFF == RamFlag.EOS:
                return
            yield from self._named(header)

    def _named(self, header: int) -> Parser:
        if header & 0xFFF not in (RamFlag.PAGE, RamFlag.ZERO):
            raise ram.bad_flags(header)
        name = yield from counted_text("RAM record")
        if name not in self.blocks:
            raise ram.unknown_block(name)
        self.block = name
        if self.note is not None:
            self.note(header, self.at if header & RamFlag.PAGE else -1)
        if header & RamFlag.PAGE:
            self.normal += 1
            yield PAGE_BYTES
        else:
            self.zero += 1
            yield 1
