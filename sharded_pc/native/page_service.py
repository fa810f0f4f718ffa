"""A source that only answers page requests, in C (page_service.h)."""

from __future__ import annotations

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.native.core import ensure_object, ffi, lib, system_error
from sharded_pc.native.ram import NotYet, Stop, Stopped, WireClosed

PAGE_BYTES: int = lib.SP_PAGE_BYTES
PATTERN_KEY: int = lib.SP_PATTERN_KEY


def pattern(page: int) -> bytes:
    """What page `page` of the block holds: the 32-bit word at offset a is a ^ PATTERN_KEY."""
    out = ffi.new("uint8_t[]", PAGE_BYTES)
    lib.sp_page_pattern(out, page)
    return bytes(ffi.buffer(out))


class PageService:
    """Serves pages [first, first + pages) of a block on a connected socket, each once.

    `stop` and the descriptor stay the caller's.
    """

    def __init__(self, fd: int, stop: Stop, block: str, first: int, pages: int) -> None:
        name = block.encode("utf-8", "surrogateescape")
        raw = lib.sp_page_service_new(fd, stop.fd, name, first, pages)
        self.raw = ffi.gc(ensure_object(raw, "allocate a page service"), lib.sp_page_service_free)

    @property
    def requests(self) -> int:
        """Messages that asked for pages of the block."""
        return self.raw.requests

    @property
    def answered(self) -> int:
        """Pages sent."""
        return self.raw.answered

    @property
    def unread(self) -> bytes:
        """What was read of a message that was not whole."""
        return bytes(ffi.buffer(self.raw.unread, self.raw.have))

    def run(self, timeout_ms: int) -> None:
        """Returns when every page was sent, without the GIL until then.

        NotYet: nothing was asked for `timeout_ms`, or a signal came; call again.  Stopped,
        WireClosed, HostError, RemoteProtocolError.
        """
        status = lib.sp_page_service_run(self.raw, timeout_ms)
        if status == lib.SP_AGAIN:
            raise NotYet
        if status == lib.SP_STOPPED:
            raise Stopped("stopped")
        if status == lib.SP_EOF:
            raise WireClosed("the receiver closed the stream")
        if status == lib.SP_BAD_FLAGS:
            raise RemoteProtocolError(f"return path message of type {self.raw.err} is malformed")
        if status == lib.SP_SYS:
            raise system_error(self.raw.err, "serve pages")
