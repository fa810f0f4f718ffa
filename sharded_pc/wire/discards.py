"""The source's discard messages (QEMU migration/postcopy-ram.c, postcopy_discard_send_*)."""

from __future__ import annotations

from collections.abc import Callable

from sharded_pc.errors import LocalProtocolError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.wire import writer
from sharded_pc.wire.constants import MAX_DISCARD_RANGES


class DiscardSender:
    """Queues one block's ranges and sends them twelve to a message.

    `send` gets whole messages.  After finish() nothing is queued.
    """

    def __init__(self, send: Callable[[bytes], None], block: str) -> None:
        self._send = send
        self._block = block
        self._ranges: list[tuple[int, int]] = []
        self._open = True

    def range(self, first_page: int, pages: int) -> None:
        """Queues `pages` pages from `first_page` on, counted within the block."""
        if not self._open or pages <= 0 or first_page < 0:
            raise LocalProtocolError(
                f"discard range of {pages} pages at page {first_page} of block {self._block!r}"
                + ("" if self._open else " after finish")
            )
        self._ranges.append((first_page * PAGE_BYTES, pages * PAGE_BYTES))
        if len(self._ranges) == MAX_DISCARD_RANGES:
            self._flush()

    def finish(self) -> None:
        """Sends what is queued."""
        if self._ranges:
            self._flush()
        self._open = False

    def _flush(self) -> None:
        self._send(writer.discard(self._block, self._ranges))
        self._ranges.clear()
