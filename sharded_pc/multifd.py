"""The channels of multifd of one connection: who has them, and where they meet the main channel.

A source opens them before it sends RAM.  They wait here until the blocks are known; then each goes
to a worker, by its number, which receives it straight into the RAM.  Each SYNC on a channel pairs
with a MULTIFD_FLUSH record on the main channel (QEMU 8.1 and later machine types) or, where none
comes in the set-up, with the end of each section (QEMU migration/ram.c).  What stands behind such a
place is done only when everything before it is, on all channels.

How many channels there are no stream tells.  The source numbers its packets over all of them: at
each meeting as many have come as were numbered, or a channel is missing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from sharded_pc.errors import RemoteProtocolError, ShardedPcError, ShardError, StreamEnded
from sharded_pc.native.control import Control
from sharded_pc.native.multifd import ChannelLost, Meeting
from sharded_pc.native.ram import Stop
from sharded_pc.recording import Recording
from sharded_pc.transport.channels import Channel
from sharded_pc.wire import multifd as wire

log = logging.getLogger(__name__)

OPENING_SECONDS = 5.0
"""From a channel's connection to its 64 bytes, and from the first channel to the last one."""
LOOK_AGAIN_SECONDS = 0.01
Give = Callable[[int, int, str | None], Awaitable[int]]
"""(number, descriptor, file to write it down): a worker has the channel; its pid.  ShardError."""


class Multifd:
    """`on_trouble(error)`: a channel broke what the migration needs.  Methods of the event loop,
    but for those of the stream's thread, which say so."""

    def __init__(
        self,
        control: Control,
        stop: Stop,
        on_trouble: Callable[[ShardedPcError], None],
        recording: Recording | None = None,
    ) -> None:
        self._meeting = Meeting(control)
        self._stop = stop
        self._on_trouble = on_trouble
        self._recording = recording
        self._waiting: list[Channel] = []
        self._given: list[int] = []
        """the pid of each channel's worker"""
        self._has_begun = False
        self._is_over = False
        self._flushes = False
        self._syncs = 0

    def take(self, channel: Channel) -> None:
        """One more channel of the source; its socket is closed by the connection."""
        self._waiting.append(channel)
        if self._has_begun:
            self._on_trouble(
                RemoteProtocolError(
                    "a channel of multifd was opened after the source had begun to send RAM"
                )
            )

    @property
    def has_begun(self) -> bool:
        """The channels were given out."""
        return self._has_begun

    async def begin(self, give: Give, settle: Callable[[], bool]) -> None:
        """All blocks are known.  `settle()`: somebody has connected and said nothing yet."""
        time = asyncio.get_running_loop().time
        deadline = time() + OPENING_SECONDS
        while settle():
            await asyncio.sleep(LOOK_AGAIN_SECONDS)  # whoever has spoken is heard meanwhile
            if not self._waiting or time() > deadline:
                break
        openings = [await _read_opening(channel) for channel in self._waiting]
        numbers = [wire.parse_opening(raw) for raw in openings]
        by_number = dict(zip(numbers, self._waiting, strict=True))
        if sorted(numbers) != list(range(len(numbers))):
            raise _not_whole(numbers)
        self._has_begun = True
        for number in range(len(numbers)):
            self._meeting.expect(number)
            record = None
            if self._recording is not None:
                record = self._recording.multifd(number, openings[numbers.index(number)])
            fd = by_number[number].sock.fileno()
            self._given.append(await give(number, fd, record))
        if self._given:
            log.info("multifd: %d channels", len(self._given))

    def look_at_workers(self, pids: Sequence[int]) -> None:
        """Those that live now: what a dead one had taken off its channel is lost."""
        lost = [number for number, pid in enumerate(self._given) if pid not in pids]
        if lost and not self._is_over:
            which = ", ".join(map(str, lost))
            self._on_trouble(
                ShardError(f"a worker died that was receiving channel {which} of multifd")
            )

    def sync(self, *, flush: bool) -> None:
        """The stream's thread: waits for all channels; RemoteProtocolError, HostError, Stopped."""
        self._flushes = self._flushes or flush
        if self._is_over or flush != self._flushes or not (self._given or flush):
            return
        if not self._given:
            raise RemoteProtocolError(
                "the source synchronises channels of multifd, and has opened none here"
            )
        self._syncs += 1
        try:
            came = self._meeting.wait(len(self._given), self._syncs, self._stop)
        except ChannelLost as lost:
            raise self._meeting.why_ended(lost.number) or _ended(lost) from None
        if came.packets < came.numbers:
            raise RemoteProtocolError(
                f"multifd: {came.numbers} packets were sent and {came.packets} have come: one of "
                f"the source's channels is not here"
            )
        self._meeting.release(self._syncs)

    def settle(self) -> None:
        """The stream's thread: pages may not come any more."""
        if self._is_over:
            return
        self._is_over = True
        late = self._meeting.settle(len(self._given))
        if late is not None:
            raise RemoteProtocolError(f"channel {late}: {wire.late_pages().what}")

    def look(self) -> None:
        """The stream's thread: raises what ended a channel, if it explains the wire's end."""
        if not self._is_over:
            for number in range(len(self._given)):
                error = self._meeting.why_ended(number)
                if error is not None:
                    raise error

    def close(self) -> None:
        """No loop waits for a meeting any more; its end is that of its connection."""
        self._is_over = True
        self._meeting.settle(0)


async def _read_opening(channel: Channel) -> bytes:
    raw = b""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(OPENING_SECONDS):
            while len(raw) < wire.OPENING_BYTES:
                more = await loop.sock_recv(channel.sock, wire.OPENING_BYTES - len(raw))
                if not more:
                    raise StreamEnded("the source closed a channel of multifd as it opened it")
                raw += more
    except TimeoutError:
        raise RemoteProtocolError(
            f"a channel of multifd did not say its number for {OPENING_SECONDS:g} s"
        ) from None
    except OSError as error:
        raise StreamEnded(f"a channel of multifd was lost ({error.strerror})") from None
    return raw


def _not_whole(numbers: list[int]) -> RemoteProtocolError:
    which = ", ".join(map(str, sorted(numbers)))
    return RemoteProtocolError(
        f"multifd: channels {which} are here, expected each number from 0 on once"
    )


def _ended(lost: ChannelLost) -> StreamEnded:
    return StreamEnded(
        f"the source closed channel {lost.number} of multifd before the migration was complete"
    )
