"""Drives a parser over a window: the stream's messages, one dict each."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from sharded_pc.dump import explain, multifd, wishes
from sharded_pc.dump.reader import Explained, channel_records
from sharded_pc.dump.records import AnyBlock, Counted, Records
from sharded_pc.dump.totals import Totals
from sharded_pc.dump.window import Window
from sharded_pc.errors import RemoteProtocolError
from sharded_pc.native.records import pass_records
from sharded_pc.wire import events
from sharded_pc.wire.constants import FILE_MAGIC, MULTIFD_MAGIC, Cmd, RamFlag, Section
from sharded_pc.wire.steps import TELL, Parser, Peek, Some

_RECOVERY = tuple(
    struct.pack(">BH", Section.COMMAND, cmd) for cmd in (Cmd.RECV_BITMAP, Cmd.POSTCOPY_RESUME)
)
_MAGICS = {FILE_MAGIC: "migration", MULTIFD_MAGIC: "multifd"}


def kind_of(opening: bytes) -> str:
    """What begins like that; with nothing to tell by it is to be a migration."""
    value = int.from_bytes(opening[:4], "big")
    if len(opening) >= 4 and value in _MAGICS:
        return _MAGICS[value]
    if opening.startswith(_RECOVERY):
        return "recovery"
    flags = int.from_bytes(opening[:8], "big") & 0xFFF
    if len(opening) == 8 and opening[0] == 0 and flags in (RamFlag.PAGE, RamFlag.ZERO):
        return "postcopy-preempt"
    return "migration"


class Walk:
    """One recording: `kind` is known at once, `totals` and `error` after messages()."""

    def __init__(self, file: BinaryIO) -> None:
        self._window = Window(file)
        self.kind = kind_of(self._window.peek(8))
        self._records = Records({} if self.kind == "migration" else AnyBlock())
        self._records.may_end = self.kind == "postcopy-preempt"
        self._reader = Explained(self._records.records)
        self._message: dict | None = None
        self._began = 0
        self.totals = Totals()
        self.error: RemoteProtocolError | None = None

    @property
    def size(self) -> int:
        """Bytes that were read."""
        return self._window.at

    def messages(self) -> Iterator[dict]:
        """Messages in the stream's order, the last one as far as it goes; `error` says why the
        stream was not read to its end.  OSError."""
        parser = self._parser()
        answer: object = None
        while True:
            try:
                want = parser.send(answer)
                if want is wishes.BEGIN:
                    yield from self._told()
                    self._begin()
                answer = self._serve(want)
            except StopIteration:
                break
            except RemoteProtocolError as error:
                error.offset = self._window.at if error.offset is None else error.offset
                if self._message is not None and error.offset > self._began:
                    error.what += f", in what began at {self._began},"
                self.error = error
                break
        yield from self._told()

    def _parser(self) -> Parser:
        match self.kind:
            case "multifd":
                return multifd.channel()
            case "postcopy-preempt":
                return channel_records(self._records.records)
            case "recovery":
                return self._reader.recovery()
        return self._reader.events()

    # One message after the other

    def _begin(self) -> None:
        self._began, self._message = self._window.at, {}
        if self._reader.in_package:
            self._message["in-package"] = True

    def _told(self) -> Iterator[dict]:
        counted, self._records.counted = self._records.counted, Counted()
        message, self._message = self._message, None
        if message is None or self._window.at == self._began:
            return
        message |= explain.counted(counted)
        message = {"offset": self._began, "size": self._window.at - self._began} | message
        self.totals.add(message)
        yield message

    def _serve(self, want: object) -> object:
        window = self._window
        match want:
            case int():
                return window.take(want)
            case Some(most):
                return window.some(most)
            case _ if want is TELL:
                return window.at
            case Peek(size):
                return window.peek(size, whole=True)
            case wishes.Ahead(most):
                return window.peek(most)
            case wishes.Skip(size):
                return window.skip(size)
            case wishes.Footer(section, most):
                return window.footer(section, most)
            case _ if want is wishes.PAGES:
                return self._pass_pages()
            case _ if want is not wishes.BEGIN:
                self._take(want)
        return None

    def _take(self, event: object) -> None:
        if isinstance(event, events.Subsection):
            self._records.capabilities = self._reader.capabilities
        if isinstance(event, events.PostcopyAdvise) and event.page_sizes is not None:
            self._records.page_sizes = event.page_sizes
        if isinstance(event, events.RamSectionEnd) and event.kind == "setup":
            self.totals.define(self._records.listed)
        if self._message is not None:
            self._message |= explain.event(event)
            if event == events.RamSectionEnd("setup"):
                self._message["blocks"] = explain.blocks(self._records.listed)

    def _pass_pages(self) -> None:
        block = self._records.current
        if block is None:
            return
        pages = self._records.counted.of(block.name)
        passed = 1
        while passed:
            view = self._window.view()
            passed = pass_records(view, block.size, pages["normal"], pages["duplicate"])
            view.release()
            self._window.passed(passed)
