"""The channel of postcopy-preempt: pages that were asked for, on a thread of their own.

QEMU's words: migration/postcopy-ram.c postcopy_preempt_thread.  The channel has no header and no
sections: page records, until EOS (7.2, and newer sources with such a machine type) or until the
source closes it when all is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sharded_pc import threads
from sharded_pc.errors import ConnectionLost, RemoteProtocolError, ShardedPcError
from sharded_pc.geometry import Placement
from sharded_pc.incoming import NOT_YET, Receiver, bad_record
from sharded_pc.memory import GuestMemory
from sharded_pc.messages import ram_reader
from sharded_pc.native.own_mapping import OwnMapping
from sharded_pc.native.ram import Ram, Records, Stop, Stopped, Stream, WireClosed
from sharded_pc.recording import Recording
from sharded_pc.state import PostcopyState

log = logging.getLogger(__name__)

QUIET_SECONDS = 10.0
"""The main channel has ended, and nothing comes on this one: so long the network may take."""
END_SECONDS = 3.0
"""The same when every page is here and only its last word is awaited: who said nothing may be
no channel of the source."""
LOOK_SECONDS = 0.01
CHANNEL = "the source's postcopy-preempt channel"


class Preempt:
    """Of one connection, whether its source opens the channel or not.

    begin() is the event loop's, the other calls are the main channel's thread's.
    `on_broken(error)` is called on this channel's thread.  `receiver` is set before arm().
    """

    receiver: Receiver

    def __init__(
        self, memory: GuestMemory, stop: Stop, on_broken: Callable[[ShardedPcError], None]
    ) -> None:
        self._memory = memory
        self._connection_stop = stop
        self._on_broken = on_broken
        self._stop = Stop()
        self._lock = threading.Lock()
        self._main: Ram | None = None
        self._stream: Stream | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._main_has_ended = False
        self._over = threading.Event()

    @property
    def has_begun(self) -> bool:
        return self._thread is not None

    def arm(self, main: Ram) -> None:
        """Pages may be asked for; `main` reads the main channel, until close()."""
        with self._lock:
            self._main = main

    def begin(self, fd: int, recording: Recording | None = None) -> None:
        """The channel has spoken; `fd` stays the caller's until close().  RemoteProtocolError,
        HostError."""
        with self._lock:
            if self._thread is not None:
                raise RemoteProtocolError("the source opened a second postcopy-preempt channel")
            if self._is_closed:
                return  # the connection has ended
            if self._main is None:
                raise RemoteProtocolError(
                    f"{CHANNEL} has pages before any was asked for",
                    state=self._memory.control.postcopy_state.name,
                )
            record_fd = -1 if recording is None else recording.preempt()
            self._stream = Stream(fd, self._stop, record_fd)
            thread = threading.Thread(target=self._run, args=(self._main,), name="preempt")
            threads.start(thread)
            self._thread = thread

    def drain(self, missing: Callable[[], int], *, awaits_end: bool) -> None:
        """The main channel has ended.  Returns when all pages are here (and with `awaits_end` this
        channel has said that it ends), when it has ended, or when nothing comes any more.
        Stopped."""
        self._main_has_ended = True
        seen, until = -1, time.monotonic() + QUIET_SECONDS
        while not self._over.wait(LOOK_SECONDS) and time.monotonic() < until:
            if self._connection_stop.is_set:
                raise Stopped("stopped")
            offset = self._stream.offset if self._stream is not None else 0
            if offset != seen:
                all_here = not missing()
                if all_here and not awaits_end:
                    return
                wait = END_SECONDS if all_here else QUIET_SECONDS
                seen, until = offset, time.monotonic() + wait
        if not self._over.is_set():
            log.warning("nothing comes on %s any more, and it has not ended", CHANNEL)

    def close(self) -> None:
        """Ends its thread, if there is one; no other begins.  May be called again."""
        with self._lock:
            self._is_closed = True
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._stop.fd >= 0:
            self._stop.close()

    def _run(self, main: Ram) -> None:
        try:
            self._receive(main)
        except Stopped:
            pass
        except ShardedPcError as error:
            if not self._main_has_ended:
                self._on_broken(error)
        finally:
            self._over.set()

    def _receive(self, main: Ram) -> None:
        assert self._stream is not None
        memory, own = self._memory, None
        if memory.placement is Placement.COPY:
            own = OwnMapping((block.fd, block.size) for block in memory.blocks)
        ram = ram_reader(memory, self._stream, self.receiver, self._stop)
        try:
            ram.read_preempt(main, own, memory.written)
            outcome = ram.records()
            if outcome is not Records.EOS:
                error = bad_record(outcome, ram, memory.geometry.blocks)
                error.what = f"{CHANNEL}: {error.what}"
                error.state = memory.control.postcopy_state.name
                raise error
        except WireClosed:
            raise self._lost() from None
        finally:
            ram.release()
            if own is not None:
                own.close()

    def _lost(self) -> ConnectionLost:
        assert self._stream is not None
        state, why = self._memory.control.postcopy_state, self._stream.broken_by
        lost = f"{CHANNEL} was lost" + (f" ({why})" if why else "")
        here = f"{self._memory.missing_pages()} pages are still there"
        text = f"{lost} in postcopy state {state.name}: {here}"
        return ConnectionLost(text + ("" if state is PostcopyState.RUNNING else NOT_YET))
