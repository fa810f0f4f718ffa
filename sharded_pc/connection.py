"""One connection of a source: its wires and the threads of their streams.

It lives from the source's first byte to the wire's end, which is the migration's end, its failure,
or a pause; the memory, its guests and the migration outlive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from sharded_pc import threads
from sharded_pc.ending import Ending
from sharded_pc.errors import RemoteProtocolError, ShardedPcError
from sharded_pc.incoming import Incoming, Receiver
from sharded_pc.loop_calls import from_stream
from sharded_pc.memory import GuestMemory
from sharded_pc.multifd import Multifd
from sharded_pc.native.ram import Ram
from sharded_pc.preempt import Preempt
from sharded_pc.recording import Recording
from sharded_pc.state import PostcopyState
from sharded_pc.transport.channels import Channel, Kind
from sharded_pc.transport.incoming import Listener, Wire
from sharded_pc.way_back import WayBack
from sharded_pc.wire import return_path

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.001
"""Enough for the event loop to look at a socket that has something to say."""


class Connection:
    """`wire` is a source's, found by `listener`, which other channels of the source may reach.

    With `resumes` it goes on with a paused migration.  All its channels are written down in
    `recording`.
    """

    def __init__(
        self,
        wire: Wire,
        listener: Listener,
        memory: GuestMemory,
        receiver_ending: Ending,
        *,
        resumes: bool = False,
        recording: Recording | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.ending = Ending(receiver_ending)
        self._wire = wire
        self._listener = listener
        self._memory = memory
        self._resumes = resumes
        self.back = WayBack(memory, wire.back_fd)
        self._has_begun = False
        self._recording = recording
        self._ends_preempt = False
        self._further: list[Wire] = []
        self._preempt = Preempt(memory, self.ending.stop, self._preempt_broken)
        self._multifd = Multifd(memory.control, self.ending.stop, self.ending.because, recording)
        self._receiver: Receiver
        self._taking = asyncio.create_task(self._take_channels())

    async def receive(self, receiver: Receiver) -> None:
        """The whole stream, for `receiver`; raises what ended it too early."""
        stop = self.ending.stop
        self._preempt.receiver = self._receiver = receiver
        record_fd = self._recording.main_fd if self._recording is not None else -1
        incoming = Incoming(
            self._memory, self._wire.fd, stop, self, receiver, record_fd, resumes=self._resumes,
            broken_by=self._wire.broken_by,
        )  # fmt: skip
        try:
            await asyncio.wrap_future(threads.run(incoming.run, "stream"))
        except ShardedPcError:
            self._tell_failure()
            if self.ending.trouble is not None:
                raise self.ending.trouble from None
            raise
        finally:
            await self.back.end()

    def _tell_failure(self) -> None:
        """A source that has stopped its guest learns that it does not run here, and may go on with
        it.  Never once it has run: then it would run twice."""
        if self._memory.control.postcopy_state is PostcopyState.LISTENING:
            with contextlib.suppress(RemoteProtocolError):
                self.back.post(return_path.shut(1))

    def hang_up(self) -> None:
        """The peer sees the end of the wire now: workers keep it open until they get another."""
        for wire in (self._wire, *self._further):
            wire.hang_up()

    def close(self) -> None:
        self._taking.cancel()
        self._preempt.close()
        self._multifd.close()
        self._listener.close()
        for wire in (self._wire, *self._further):
            wire.close()
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
            case Kind.PREEMPT:
                self._take_preempt(channel)

    def _take_multifd(self, channel: Channel) -> None:
        self._further.append(self._listener.wire(channel))
        self._multifd.take(channel)

    def _take_preempt(self, channel: Channel) -> None:
        wire = self._listener.wire(channel)
        self._further.append(wire)
        try:
            self._preempt.begin(wire.fd, self._recording)
        except ShardedPcError as error:
            self.ending.because(error)

    def _preempt_broken(self, error: ShardedPcError) -> None:
        """On its thread."""
        self.loop.call_soon_threadsafe(self.ending.because, error)

    def ram_begins(self) -> None:
        """Waited for, once: a source that must not get to its switch has no head start."""
        if not self._has_begun:
            self._has_begun = True
            self._settle()

    @from_stream
    async def _settle(self) -> None:
        """Postcopy-preempt's channel says nothing before a page is asked for.  A source that has it
        open before its switch (7.2) ends it with a word of its own."""
        early = self._memory.control.postcopy_state <= PostcopyState.ADVISE
        self._ends_preempt = self._listener.settle() and early and not self._resumes
        await asyncio.sleep(LOOK_SECONDS)  # whoever has spoken is heard before the source goes on

    @from_stream
    async def _has_preempt(self) -> bool:
        """There is such a channel, or one that may yet say that it is."""
        return self._listener.settle() or self._preempt.has_begun

    def sync_channels(self, *, flush: bool) -> None:
        if self._resumes:
            return
        if not self._multifd.has_begun:
            self._begin_multifd()
        self._multifd.sync(flush=flush)

    @from_stream
    async def _begin_multifd(self) -> None:
        """Waited for, once, before the source's first page counts."""
        begin = self._multifd.begin(self._receiver.give_channel, self._listener.settle)
        await self.ending.unless_over(begin)

    def settle_channels(self) -> None:
        self._multifd.settle()

    def look_at_channels(self) -> None:
        self._multifd.look()

    def look_at_workers(self, pids: Sequence[int]) -> None:
        """One of them has a successor."""
        self._multifd.look_at_workers(pids)

    def serve_requested(self, main: Ram) -> None:
        """A source has connected all its channels before its package; in a recovery 7.2 does it
        beside everything else."""
        self._preempt.arm(main)
        if not self._resumes:
            self._listener.withdraw()

    def requested_served(self) -> None:
        missing = self._memory.missing_pages
        if self._ends_preempt or (missing() and self._has_preempt()):
            self._preempt.drain(missing, awaits_end=self._ends_preempt)

    def stop_requested(self) -> None:
        self._preempt.close()
