"""The return path in C (return_path.h)."""

from __future__ import annotations

import time

from sharded_pc.native.control import Bitmap, Control
from sharded_pc.native.core import ensure, ensure_object, ffi, lib, system_error

POST_SECONDS = 5.0


class ReturnPath:
    """The one writer of the way back.  `fd` -1: there is none, messages are dropped."""

    def __init__(self, control: Control, fd: int) -> None:
        self._keep: object = control
        raw = ensure_object(lib.sp_rp_new(control.raw, fd), "allocate a return path")
        self.raw = ffi.gc(raw, lib.sp_rp_free)

    def post(self, message: bytes) -> None:
        """Queues one message of at most some hundred bytes, waiting while the queue is full;
        HostError if the wire takes nothing for POST_SECONDS."""
        deadline = time.monotonic() + POST_SECONDS
        while (rc := lib.sp_rp_post(self.raw, message, len(message))) < 0:
            if time.monotonic() > deadline:
                ensure(rc, "queue a return path message")
            time.sleep(0.001)

    def arm(self, received: Bitmap, requested: Bitmap) -> None:
        """Page requests may be sent from now on; what is requested and not received is sent first.
        The bitmaps must outlive this."""
        self._keep = (self._keep, received, requested)
        lib.sp_rp_arm(self.raw, received.raw, requested.raw)

    def again(self) -> None:
        """Sends once more what is requested and not received: a request may have been lost."""
        lib.sp_rp_again(self.raw)

    def bitmap(self, received: Bitmap, block: int) -> None:
        """Queues the RECV_BITMAP of a block; HostError if very many wait already."""
        self._keep = (self._keep, received)
        ensure(lib.sp_rp_bitmap(self.raw, received.raw, block), "queue a received bitmap")

    def stop(self) -> None:
        """Ends the loop once everything posted was sent."""
        lib.sp_rp_stop(self.raw)

    def loop(self) -> None:
        """Runs until stop(); HostError when the wire cannot be written."""
        if lib.sp_rp_loop(self.raw) == lib.SP_SYS:
            raise system_error(self.raw.err, "write to the return path")
