"""Channels of multifd in C: a worker's loop for each, and where they meet the main channel
(multifd/loop.h, stream/sync.h)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from sharded_pc.errors import RemoteProtocolError, ShardedPcError
from sharded_pc.native.control import Bitmap, Control
from sharded_pc.native.core import ensure_object, ffi, lib, system_error
from sharded_pc.native.ram import Stop, raise_for
from sharded_pc.wire import multifd as text


def can_unpack(method: int) -> bool:
    """Whether this build has the library for it (wire.multifd.Flag)."""
    return bool(lib.sp_unpack_knows(method))


class ChannelLoop:
    """Receives one channel straight into the blocks.  `written`: with `continue`.  Buffers must
    outlive it."""

    def __init__(
        self,
        control: Control,
        number: int,
        fd: int,
        received: Bitmap,
        written: Bitmap | None,
        block_fds: Sequence[int],
    ) -> None:
        """`fd`: a socket behind its opening, which stays the caller's."""
        os.set_blocking(fd, True)
        self._keep = (control, received, written)
        bits = ffi.NULL if written is None else written.raw
        raw = lib.sp_multifd_new(control.raw, number, fd, received.raw, bits)
        self.raw = ffi.gc(ensure_object(raw, "allocate a channel of multifd"), lib.sp_multifd_free)
        for index, block_fd in enumerate(block_fds):
            lib.sp_multifd_use_block(self.raw, index, block_fd)

    def record(self, fd: int) -> None:
        """What comes is written down in `fd`, which stays the caller's, too.  Before run()."""
        lib.sp_multifd_record(self.raw, fd)

    def run(self) -> None:
        """Until the channel ends, or its socket is shut down."""
        lib.sp_multifd_run(self.raw)

    def stop(self) -> None:
        """run() ends, and the channel with it."""
        lib.sp_multifd_stop(self.raw)

    def release(self) -> None:
        ffi.release(self.raw)


@dataclasses.dataclass(frozen=True, slots=True)
class Came:
    """Packets of all channels that came, and how many the source has numbered."""

    packets: int
    numbers: int


class ChannelLost(ShardedPcError):
    """A channel ended of which a SYNC was awaited."""

    def __init__(self, number: int) -> None:
        super().__init__(f"channel {number} of multifd ended")
        self.number = number


class Meeting:
    """The main channel's side: all channels of one migration, numbered from 0 on."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def expect(self, number: int) -> None:
        """Before a worker is given the channel."""
        lib.sp_sync_expect(self._control.raw, number)

    def wait(self, channels: int, syncs: int, stop: Stop) -> Came:
        """Until each has come to so many SYNCs; ChannelLost, Stopped."""
        view = ffi.new("sp_sync_view *")
        status = lib.sp_sync_await(self._control.raw, channels, syncs, stop.word, view)
        raise_for(status, 0)
        if status == lib.SP_CHANNEL_LOST:
            raise ChannelLost(view.lost)
        return Came(view.packets, view.numbers)

    def release(self, syncs: int) -> None:
        lib.sp_sync_release(self._control.raw, syncs)

    def settle(self, channels: int) -> int | None:
        """No page may come any more; None, or the channel that is bringing some."""
        late = lib.sp_sync_settle(self._control.raw, channels)
        return None if late < 0 else late

    def why_ended(self, number: int) -> ShardedPcError | None:
        """None: it goes on, or was closed between two packets."""
        channel = self._control.raw.channels[number]
        if channel.state != lib.SP_MULTIFD_ENDED or channel.status == lib.SP_EOF:
            return None
        if channel.status == lib.SP_SYS:
            return system_error(channel.err, f"receive channel {number} of multifd")
        return _bad_packet(number, channel)


def _bad_packet(number: int, channel) -> RemoteProtocolError:
    value, limit = channel.value, channel.limit
    name = bytes(ffi.string(channel.name)).decode("utf-8", "surrogateescape")
    error = {
        lib.SP_PACKET_MAGIC: lambda: text.bad_magic(value),
        lib.SP_PACKET_VERSION: lambda: text.bad_version(value),
        lib.SP_PACKET_KIND: lambda: text.unsupported(value),
        lib.SP_PACKET_PAGES: lambda: text.too_many_pages(value, limit),
        lib.SP_PACKET_SIZE: lambda: text.bad_size(value, limit),
        lib.SP_PACKET_BLOCK: lambda: text.unknown_block(name),
        lib.SP_PACKET_OFFSET: lambda: text.bad_offset(value, name, limit),
        lib.SP_PACKET_PACKED: lambda: text.bad_packing(value, limit),
        lib.SP_PACKET_LATE: lambda: text.late_pages(),
        lib.SP_CHANNEL_CUT: lambda: text.cut(),
    }[channel.status]()
    return RemoteProtocolError(f"channel {number}: {error.what}")
