"""A source without a VM: speaks the real stream, serves page requests, pushes in the background.

The RAM is synthetic (testing/oracle.py).  It goes through a migration's life as QEMU's source does:
set-up, one precopy pass, switch (discards, package), postcopy with requests first and a background
scan that goes on behind the last requested page, END, EOF, and the destination's SHUT.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import socket
import threading
import time
from array import array
from collections.abc import Callable

from sharded_pc.errors import ConnectionLost, RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.testing.oracle import PageOracle, runs
from sharded_pc.wire import return_path, writer
from sharded_pc.wire.discards import DiscardSender
from sharded_pc.wire.feed import Feed

BATCH_PAGES = 64
ANSWER_SECONDS = 30.0


class ReturnPathReader:
    """Reads the destination's messages on a thread: requests queue up, SHUT can be waited for."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.requests: collections.deque[return_path.ReqPages] = collections.deque()
        self.shut: int | None = None
        self.pongs: list[int] = []
        self.bitmaps: dict[str, bytes] = {}
        self.resumed: int | None = None
        self.error: Exception | None = None
        self._news = threading.Condition()
        self.over = False
        self._thread = threading.Thread(target=self._run, name="source-return-path", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        feed = Feed(return_path.messages())
        try:
            while data := self._sock.recv(65536):
                for message in feed.feed(data):
                    self._take(message)
        except (OSError, RemoteProtocolError) as error:
            self.error = error
        with self._news:
            self.over = True
            self._news.notify_all()

    def _take(self, message: object) -> None:
        with self._news:
            match message:
                case return_path.ReqPages():
                    self.requests.append(message)
                case return_path.Pong(value):
                    self.pongs.append(value)
                case return_path.Shut(value):
                    self.shut = value
                case return_path.RecvBitmap(block, words):
                    self.bitmaps[block] = words
                case return_path.ResumeAck(value):
                    self.resumed = value
            self._news.notify_all()

    def wait_request(self, seconds: float) -> bool:
        """True when a request is there."""
        with self._news:
            return self._news.wait_for(lambda: bool(self.requests) or self.over, seconds)

    def wait_shut(self) -> int:
        """The SHUT's value; ConnectionLost if none comes."""
        self._wait(lambda: self.shut is not None, "closed without SHUT")
        return self.shut

    def wait_bitmap(self, block: str) -> bytes:
        """The received bits of a block (return_path.RecvBitmap); ConnectionLost if none come."""
        self._wait(lambda: block in self.bitmaps, f"told no received bitmap of {block!r}")
        return self.bitmaps[block]

    def wait_resumed(self) -> None:
        """Returns when the destination is ready for pages again; ConnectionLost."""
        self._wait(lambda: self.resumed == return_path.RESUMED, "did not acknowledge the resume")

    def _wait(self, came: Callable[[], bool], otherwise: str) -> None:
        with self._news:
            self._news.wait_for(lambda: came() or self.over, ANSWER_SECONDS)
        if not came():
            raise ConnectionLost(f"the destination {otherwise}") from self.error


def _whole_pages(before: bytes, after: bytes, whole: int) -> bytearray:
    """Which pages changed: all `whole` of a page of the source's memory if one did, as in QEMU's
    source (migration/ram.c postcopy_chunk_hostpages_pass)."""
    changed = bytearray(b != a for a, b in zip(before, after, strict=True))
    for first in range(0, len(changed), whole) if whole > 1 else ():
        if any(changed[first : first + whole]):
            changed[first : first + whole] = b"\1" * whole
    return changed


class SyntheticSource:
    """Migrates a PageOracle's RAM over a connected socket.

    `bandwidth` limits the background push in bytes/s (None: as fast as it goes); requested pages
    are never limited.  Several precopy passes may be asked for.
    """

    def __init__(
        self, sock: socket.socket, pages: PageOracle, *, bandwidth: float | None = None
    ) -> None:
        self._sock = sock
        self._oracle = pages
        self._bandwidth = bandwidth
        self.back = ReturnPathReader(sock)
        self._named: int | None = None
        count = range(len(pages.blocks))
        self._final = [pages.final(block) for block in count]
        self._page_sizes = [block.source_page_size for block in pages.blocks]
        self._missing = [
            _whole_pages(pages.precopied(block), self._final[block], size // PAGE_BYTES)
            for block, size in zip(count, self._page_sizes, strict=True)
        ]
        self._scan = (0, 0)
        self.requested_pages = 0

    def _send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def migrate(self) -> None:
        """From the first byte to SHUT; ConnectionLost if the destination goes away or refuses."""
        try:
            self.set_up()
            self.precopy()
            self.switch()
            self.postcopy()
            self.finish()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionLost("the destination closed the connection") from error

    def set_up(self) -> None:
        self._send(
            writer.header()
            + writer.configuration("synthetic")
            + writer.open_return_path()
            + writer.ping(1)
            + writer.postcopy_advise(functools.reduce(operator.or_, self._page_sizes))
            + writer.ram_setup(self._oracle.blocks)
        )

    def _records(self, block: int, pages: array, versions: bytes) -> bytes:
        go_on, self._named = self._named == block, block
        return self._oracle.records(block, pages, versions, go_on=go_on)

    def precopy(self) -> None:
        """One pass over everything."""
        for block, ram in enumerate(self._oracle.blocks):
            versions = self._oracle.precopied(block)
            for first in range(0, ram.pages, BATCH_PAGES * 8):
                pages = array("Q", range(first, min(first + BATCH_PAGES * 8, ram.pages)))
                self._send(writer.ram_section(self._records(block, pages, versions)))

    def switch(self) -> None:
        """The VM stops: what changed since is discarded, device state goes over in a package."""
        for block, missing in enumerate(self._missing):
            sender = DiscardSender(self._send, self._oracle.blocks[block].name)
            for first, count in runs(missing):
                sender.range(first, count)
            sender.finish()
        self._send(writer.ping(2) + writer.packaged(b"synthetic devices") + writer.ping(4))

    def resume(self, sock: socket.socket) -> None:
        """Goes on with a paused migration over another socket: asks what is here, and is ready for
        postcopy() then.  The old socket stays the caller's.  ConnectionLost."""
        self._sock, self.back, self._named = sock, ReturnPathReader(sock), None
        for block in self._oracle.blocks:
            self._send(writer.recv_bitmap(block.name))
        for index, block in enumerate(self._oracle.blocks):
            words = self.back.wait_bitmap(block.name)
            self._missing[index] = bytearray(
                not words[page // 8] >> page % 8 & 1 for page in range(block.pages)
            )
        self._send(writer.postcopy_resume())
        self.back.wait_resumed()

    def postcopy(self) -> None:
        """Requests first, then the background scan, until nothing is missing."""
        start, sent = time.monotonic(), 0
        while True:
            while self.back.requests:
                self._serve(self.back.requests.popleft())
            if self._bandwidth and (wait := sent / self._bandwidth - time.monotonic() + start) > 0:
                self.back.wait_request(wait)
                continue
            pages = self._next_batch()
            if pages is None:
                return
            sent += len(pages[1]) * PAGE_BYTES
            self._send_pages(*pages)
            if self.back.over:
                raise ConnectionLost("the destination closed the connection")

    def _send_pages(self, block: int, pages: array) -> None:
        for page in pages:
            self._missing[block][page] = 0
        self._send(writer.ram_section(self._records(block, pages, self._final[block])))

    def _serve(self, request: return_path.ReqPages) -> None:
        names = [ram.name for ram in self._oracle.blocks]
        block, first = names.index(request.block), request.start // PAGE_BYTES
        if request.start % self._page_sizes[block] or request.length % self._page_sizes[block]:
            raise RemoteProtocolError(f"{request} is not whole pages of the source's memory")
        wanted = range(first, first + request.length // PAGE_BYTES)
        pages = array("Q", [page for page in wanted if self._missing[block][page]])
        if pages:
            self.requested_pages += len(pages)
            self._send_pages(block, pages)
        self._scan = (block, wanted.stop)

    def _next_batch(self) -> tuple[int, array] | None:
        """The next missing pages from the scan's place on, round to where it began."""
        count = len(self._missing)
        block, page = self._scan
        for turn in range(count + 1):
            here = (block + turn) % count
            first = self._missing[here].find(1, page if turn == 0 else 0)
            if first >= 0:
                end = self._batch_end(here, first)
                self._scan = (here, end)
                return here, array("Q", range(first, end))
        return None

    def _batch_end(self, block: int, first: int) -> int:
        """A page of the source's memory is sent to its end before anything else is."""
        whole = self._page_sizes[block] // PAGE_BYTES
        most = min(-(-(first + BATCH_PAGES) // whole) * whole, len(self._missing[block]))
        end = self._missing[block].find(0, first, most)
        return most if end < 0 else end

    def finish(self) -> None:
        """END, EOF, and the destination's SHUT; ConnectionLost if it is not 0."""
        self._send(writer.ram_section(b"", last=True) + writer.eof())
        value = self.back.wait_shut()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if value:
            raise ConnectionLost(f"the destination reported failure {value}")
