"""A source with postcopy-preempt for tests that need no QEMU: what is asked for goes over a second
connection, and when that is opened and how it ends is the test's to say."""

from __future__ import annotations

import contextlib
import socket
from array import array
from collections.abc import Iterator, Sequence

from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.wire import return_path
from tests.synthetic import WAIT_S, StepSource, connect

EOS = (0x10).to_bytes(8, "big")


class PreemptSource(StepSource):
    """`preempt` is the second connection, open()ed before anything goes over it."""

    preempt: socket.socket

    def open(self, uri: str) -> None:
        self.preempt = connect(uri)
        self._preempt_named: int | None = None

    def records(self, block: int, pages: Sequence[int]) -> bytes:
        """As they are at the end; the channel has a CONTINUE of its own."""
        go_on, self._preempt_named = self._preempt_named == block, block
        return self._oracle.records(block, array("Q", pages), self._final[block], go_on=go_on)

    def send_requested(self, block: int, pages: Sequence[int]) -> None:
        for page in pages:
            self._missing[block][page] = 0
        self.preempt.sendall(self.records(block, pages))

    def _serve(self, request: return_path.ReqPages) -> None:
        names = [ram.name for ram in self._oracle.blocks]
        block, first = names.index(request.block), request.start // PAGE_BYTES
        wanted = range(first, first + request.length // PAGE_BYTES)
        if pages := [page for page in wanted if self._missing[block][page]]:
            self.requested_pages += len(pages)
            self.send_requested(block, pages)
        self._scan = (block, wanted.stop)

    def close_preempt(self) -> None:
        with contextlib.suppress(OSError):
            self.preempt.shutdown(socket.SHUT_RDWR)
        self.preempt.close()


@contextlib.contextmanager
def preempting(uri: str, **options) -> Iterator[PreemptSource]:
    """A source that has connected, by its main channel only."""
    with contextlib.closing(connect(uri)) as sock:
        source = PreemptSource(sock, **options)
        try:
            yield source
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            source.back._thread.join(WAIT_S)
            if hasattr(source, "preempt"):
                source.close_preempt()
