"""A source whose RAM is a pattern: it switches at once and then only answers page requests."""

from __future__ import annotations

import socket
import threading
from types import TracebackType

from sharded_pc.errors import ConnectionLost, GuestLost, ShardedPcError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.native.page_service import PATTERN_KEY, PageService
from sharded_pc.native.ram import NotYet, Stop, Stopped
from sharded_pc.wire import return_path, writer
from sharded_pc.wire.steps import Some

BLOCK = "pc.ram"
FIRST_BYTE = PATTERN_KEY & 0xFF
"""Of every page (little-endian words)."""
QUIET_MS = 200
STUCK_SECONDS = 30.0
_SECTION_END = len(writer.eos() + writer.footer())


def _connected(uri: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(STUCK_SECONDS)
    sock.connect(uri.removeprefix("unix:"))
    return sock


class PageSource:
    """Serves `size` bytes to the receiver at a unix address until the block ends."""

    def __init__(self, uri: str, size: int) -> None:
        self._size = size
        self._stop = Stop()
        self._error: ShardedPcError | None = None
        self._may_be_lost = False
        self._sock = _connected(uri)

    def __enter__(self) -> PageSource:
        self._begin()
        self._go_on()
        return self

    def _go_on(self) -> None:
        self._may_be_lost = False
        self._service = PageService(
            self._sock.fileno(), self._stop, BLOCK, 0, self._size // PAGE_BYTES
        )
        self._thread = threading.Thread(target=self._serve, name="page-source")
        self._thread.start()

    def expect_loss(self) -> None:
        """The receiver may go away from now on, until resume()."""
        self._may_be_lost = True

    def cut(self) -> None:
        """Both directions end."""
        self.expect_loss()
        self._sock.shutdown(socket.SHUT_RDWR)

    def resume(self, uri: str) -> None:
        """Goes on with the paused receiver at another address; ConnectionLost."""
        self._thread.join(STUCK_SECONDS)
        self._sock.close()
        self._sock = _connected(uri)
        self._sock.sendall(writer.recv_bitmap(BLOCK))
        self._expect(return_path.RecvBitmap)
        self._sock.sendall(writer.postcopy_resume())
        self._expect(return_path.ResumeAck)
        self._sock.sendall(writer.ram_section(b"")[:-_SECTION_END])
        self._go_on()

    def _expect(self, kind: type) -> None:
        """Takes one message and not a byte more."""
        parser = return_path.messages()
        want = next(parser)
        while not isinstance(want, kind):
            size = want.most if isinstance(want, Some) else want
            if not isinstance(size, int):
                raise ConnectionLost(f"the receiver says {size} in a recovery")
            want = parser.send(self._read(size))

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._sock.recv(size - len(data))
            if not piece:
                raise ConnectionLost("the receiver closed in the middle of a recovery")
            data += piece
        return bytes(data)

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
            if not self._may_be_lost:
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
