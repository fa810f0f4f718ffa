"""Device state that a destination loads while the stream goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from sharded_pc.errors import ShardedPcError
from sharded_pc.native.ram import Stop, Stopped
from sharded_pc.wire.events import PostcopyRun

LOOK_SECONDS = 0.1
"""Between two looks at the stop switch."""


class Loading:
    """One loading, `future`, of device state that came in a package (`packaged`) or after the RAM.
    The rest of a package says that it was loaded, which is true only once it is: it goes to
    `handle`, in order, on the thread that loaded."""

    def __init__(
        self, future: Future, handle: Callable[[object], None], stop: Stop, *, packaged: bool
    ) -> None:
        self._future = future
        self._defers = packaged
        self._handle = handle
        self._stop = stop
        self._deferred: list[object] = []
        self._error: ShardedPcError | None = None
        self._done = threading.Event()

        if not packaged:
            future.add_done_callback(self._after)

    def takes(self, event: object) -> bool:
        """It is handled when all is loaded: the package's rest, up to RUN."""
        if not self._defers:
            return False
        self._deferred.append(event)
        if isinstance(event, PostcopyRun):
            self._defers = False
            self._future.add_done_callback(self._after)
        return True

    def _after(self, future: Future) -> None:
        try:
            if not future.cancelled() and future.exception() is None:
                for event in self._deferred:
                    self._handle(event)
        except ShardedPcError as error:
            self._error = error
        finally:
            self._done.set()

    def wait(self) -> None:
        """Returns when everything that was deferred is handled; raises what the loading or the
        handling raised; Stopped."""
        while not self._done.wait(LOOK_SECONDS):
            if self._stop.is_set:
                raise Stopped("stopped")
        if self._error is not None:
            raise self._error
        self._future.result()
