"""One connection of a source: its wire, the stream's thread, and the way back.

It lives from the source's first byte to the wire's end, which is the migration's end, its failure,
or a pause; the memory, its guests and the migration outlive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from concurrent.futures import Future

from sharded_pc import threads
from sharded_pc.ending import Ending
from sharded_pc.errors import HostError, RemoteProtocolError, ShardedPcError
from sharded_pc.incoming import Incoming, Receiver
from sharded_pc.loop_calls import from_stream
from sharded_pc.memory import GuestMemory
from sharded_pc.native.return_path import ReturnPath
from sharded_pc.state import PostcopyState
from sharded_pc.transport.candidates import second_channel
from sharded_pc.transport.channels import Channel, Kind
from sharded_pc.transport.incoming import Listener, Wire
from sharded_pc.wire import return_path

log = logging.getLogger(__name__)


class Connection:
    """`wire` is a source's, found by `listener`, which other channels of the source may reach.

    With `resumes` it goes on with a paused migration.
    """

    def __init__(
        self,
        wire: Wire,
        listener: Listener,
        memory: GuestMemory,
        receiver_ending: Ending,
        *,
        resumes: bool = False,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.ending = Ending(receiver_ending)
        self._wire = wire
        self._listener = listener
        self._memory = memory
        self._resumes = resumes
        self._return_path: ReturnPath | None = None
        self._return_end: Future | None = None
        self._is_one_channel = False
        self._taking = asyncio.create_task(self._take_channels())

    async def receive(self, receiver: Receiver, record_fd: int = -1) -> None:
        """The whole stream, for `receiver`; raises what ended it too early."""
        stop = self.ending.stop
        incoming = Incoming(
            self._memory, self._wire.fd, stop, self, receiver, record_fd, resumes=self._resumes
        )
        try:
            await asyncio.wrap_future(threads.run(incoming.run, "stream"))
        except ShardedPcError:
            self._tell_failure()
            if self.ending.trouble is not None:
                raise self.ending.trouble from None
            raise
        finally:
            await self._end_return_path()

    def _tell_failure(self) -> None:
        """A source that has stopped its guest learns that it does not run here, and may go on with
        it.  Never once it has run: then it would run twice."""
        if self._memory.control.postcopy_state is PostcopyState.LISTENING:
            with contextlib.suppress(RemoteProtocolError):
                self.post(return_path.shut(1))

    def hang_up(self) -> None:
        """The peer sees the end of the wire now: workers keep it open until they get another."""
        self._wire.hang_up()

    def close(self) -> None:
        self._taking.cancel()
        self._listener.close()
        self._wire.close()
        self.ending.close()

    # Channels

    async def _take_channels(self) -> None:
        while True:
            self._take(await self._listener.channel())

    def _take(self, channel: Channel) -> None:
        """A further channel of the source, as soon as it has said what it is."""
        match channel.kind:
            case Kind.MULTIFD:
                self._take_multifd(channel)
            case _:
                self._refuse(channel)

    def _take_multifd(self, channel: Channel) -> None:
        """Multifd opens its channels first of all; the source would wait for them for ever.  The
        migration fails, the source's guest goes on."""
        self._refuse(channel)

    def _refuse(self, channel: Channel) -> None:
        channel.sock.close()
        self._end_by_second_channel()

    def _end_by_second_channel(self) -> None:
        self.ending.because(second_channel(self._memory.control.postcopy_state.name))

    def one_channel(self) -> None:
        """Waited for, once: a source that must not get to its switch has no head start."""
        if not self._is_one_channel:
            self._is_one_channel = True
            self._stop_listening()

    @from_stream
    async def _stop_listening(self) -> None:
        """A newer source opens postcopy-preempt's channel as it switches.  It takes a refused
        connection well, but not (10.0.2) a stream that breaks at that moment."""
        if self._taking.cancel() and self._listener.is_second_silent():
            self._end_by_second_channel()
        self._listener.close()

    # The way back

    @property
    def requests_fd(self) -> int:
        """Where fault loops may send requests themselves; -1: nowhere."""
        fd = self._wire.back_fd
        return fd if fd >= 0 and stat.S_ISSOCK(os.fstat(fd).st_mode) else -1

    def open_return_path(self) -> None:
        if self._return_path is not None:
            return
        self._return_path = ReturnPath(self._memory.control, self._wire.back_fd)
        self._return_end = threads.run(self._send_back, "return-path")

    def arm(self) -> None:
        """Pages may be requested from now on; those that wait already are."""
        if self._return_path is not None:
            self._return_path.arm(self._memory.received, self._memory.requested)

    def ask_again(self) -> None:
        """Asks the source for everything that is requested and not received."""
        if self._return_path is not None:
            self._return_path.again()

    def post(self, message: bytes) -> None:
        assert self._return_path is not None
        try:
            self._return_path.post(message)
        except HostError:  # ENOBUFS
            raise RemoteProtocolError(
                "the source does not read its return path: too many answers to it wait"
            ) from None

    def send_bitmap(self, block: int) -> None:
        assert self._return_path is not None
        self._return_path.bitmap(self._memory.received, block)

    def _send_back(self) -> None:
        assert self._return_path is not None
        try:
            self._return_path.loop()
        except HostError as error:
            # The stream's thread meets the same broken wire and says what it means.
            log.warning("%s", error)

    async def _end_return_path(self) -> None:
        if self._return_path is not None and self._return_end is not None:
            self._return_path.stop()
            await asyncio.wrap_future(self._return_end)
