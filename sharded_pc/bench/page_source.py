"""A source whose RAM is a pattern: it switches at once and then only answers page requests."""

from __future__ import annotations

import socket
import threading
from types import TracebackType

from sharded_pc.errors import GuestLost, ShardedPcError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.native.page_service import PATTERN_KEY, PageService
from sharded_pc.native.ram import NotYet, Stop, Stopped
from sharded_pc.wire import writer

BLOCK = "pc.ram"
FIRST_BYTE = PATTERN_KEY & 0xFF
"""Of every page (little-endian words)."""
QUIET_MS = 200
STUCK_SECONDS = 30.0
_SECTION_END = len(writer.eos() + writer.footer())


class PageSource:
    """Serves `size` bytes to the receiver at a unix address until the block ends."""

    def __init__(self, uri: str, size: int) -> None:
        self._path, self._size = uri.removeprefix("unix:"), size
        self._stop = Stop()
        self._error: ShardedPcError | None = None
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(STUCK_SECONDS)
        self._thread = threading.Thread(target=self._serve, name="page-source")

    def __enter__(self) -> PageSource:
        self._sock.connect(self._path)
        self._begin()
        self._service = PageService(
            self._sock.fileno(), self._stop, BLOCK, 0, self._size // PAGE_BYTES
        )
        self._thread.start()
        return self

    def _begin(self) -> None:
        """Through the switch, into a section of pages that does not end."""
        self._sock.sendall(
            writer.header() + writer.configuration("pattern") + writer.open_return_path()
            + writer.ping(1) + writer.postcopy_advise()
            + writer.ram_setup((RamBlock(BLOCK, self._size),))
            + writer.discard(BLOCK, [(0, self._size)])
            + writer.packaged(b"no devices") + writer.ping(4)
            + writer.ram_section(b"")[:-_SECTION_END]
        )  # fmt: skip

    def _serve(self) -> None:
        try:
            while True:
                try:
                    self._service.run(QUIET_MS)
                    return
                except NotYet:
                    continue
        except Stopped:
            pass
        except ShardedPcError as error:
            self._error = error

    def check(self) -> None:
        """GuestLost if it could not go on."""
        if self._error is not None:
            raise GuestLost(f"the source lost the receiver: {self._error}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._sock.close()
        self._stop.close()
