"""Device state that a destination loads while the stream goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from sharded_pc.errors import ShardedPcError
from sharded_pc.native.ram import Stop, Stopped

LOOK_SECONDS = 0.1
"""Between two looks at the stop switch."""


class Loading:
    """One loading, `future`.  Events that come meanwhile and say that it is done wait for it: they
    go to `handle`, in order, on the thread that loaded."""

    def __init__(self, future: Future, handle: Callable[[object], None], stop: Stop) -> None:
        self._future = future
        self._handle = handle
        self._stop = stop
        self._deferred: list[object] = []
        self._error: ShardedPcError | None = None
        self._done = threading.Event()

    def defer(self, event: object) -> None:
        """Before follow()."""
        self._deferred.append(event)

    def follow(self) -> None:
        """No more events are deferred."""
        self._future.add_done_callback(self._after)

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
