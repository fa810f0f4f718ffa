"""The two readers of RAM records behind one interface: give them pieces, see what they did.

`Reference` is wire/ram.py.  `Precopy` and `Postcopy` are the C core on real memory: a socket brings
the pieces, never more than one at a time, and a reader that answers NotYet is what makes every run
the same.  In postcopy real placement loops work, each with a userfaultfd of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import socket
import threading
from collections.abc import Iterable, Sequence

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES, Geometry, Placement, RamBlock
from sharded_pc.incoming import bad_record
from sharded_pc.native.alias import Alias
from sharded_pc.native.control import POOL_BYTES_PER_SHARD, Bitmap, Control, control_bytes
from sharded_pc.native.own_mapping import OwnMapping
from sharded_pc.native.ram import NotYet, Ram, Records, Stop, Stream
from sharded_pc.native.shard import Shard
from sharded_pc.native.uffd import Uffd
from sharded_pc.wire import events, xbzrle
from sharded_pc.wire.feed import Feed
from sharded_pc.wire.ram import Channel
from sharded_pc.wire.steps import TELL, Parser

SHARDS = 2
STRIPE_BYTES = 64 * PAGE_BYTES
POOL_SLOTS = POOL_BYTES_PER_SHARD // PAGE_BYTES


@dataclasses.dataclass
class Seen:
    """What a reader made of a stream."""

    memory: dict[str, bytes]
    received: dict[str, list[int]]
    """page numbers"""
    sections: list[int]
    """stream offsets behind each EOS"""
    normal: int = 0
    duplicate: int = 0
    error: str | None = None
    at: int | None = None
    """stream offset that the error names"""
    eaten: int = 0
    """bytes given until the end or the error"""


class Image:
    """A guest's memory in plain Python."""

    def __init__(self, blocks: Sequence[RamBlock], *, first_wins: bool) -> None:
        self._pages: dict[str, dict[int, bytes]] = {block.name: {} for block in blocks}
        self._blocks = blocks
        self._first_wins = first_wins
        self.normal = self.duplicate = 0

    def put(self, block: str, page: int, data: bytes | None) -> None:
        """None: zeros."""
        self.normal += data is not None
        self.duplicate += data is None
        if not (self._first_wins and page in self._pages[block]):
            self._pages[block][page] = data or bytes(PAGE_BYTES)

    def patch(self, block: str, page: int, encoded: bytes) -> None:
        old = self._pages[block].get(page, bytes(PAGE_BYTES))
        self._pages[block][page] = xbzrle.patched(old, encoded)

    def seen(self, sections: list[int]) -> Seen:
        memory = {}
        for block in self._blocks:
            raw = bytearray(block.size)
            for page, data in self._pages[block.name].items():
                raw[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = data
            memory[block.name] = bytes(raw)
        received = {name: sorted(pages) for name, pages in self._pages.items()}
        return Seen(memory, received, sections, self.normal, self.duplicate)


class Reference:
    """wire/ram.py, its events applied to an Image."""

    first_wins = False

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._blocks = blocks

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, pieces: Iterable[bytes]) -> Seen:
        image, sections = Image(self._blocks, first_wins=self.first_wins), []
        feed, error, eaten = Feed(self._reader(image, sections)), None, 0
        for piece in pieces:
            eaten += len(piece)
            try:
                feed.feed(piece)
            except RemoteProtocolError as refused:
                error = refused
                break
        return _ended(image.seen(sections), error, eaten)

    def _reader(self, image: Image, sections: list[int]) -> Parser:
        """All sections; their events become pages of the image on the way."""
        channel = Channel({block.name: block for block in self._blocks})
        channel.postcopy = self.first_wins
        while True:
            yield from _applied(channel.records(), image)
            sections.append((yield TELL))


def _applied(records: Parser, image: Image) -> Parser:
    answer = None
    while True:
        try:
            want = records.send(answer)
        except StopIteration:
            return
        match want:
            case events.RamPage(block, offset, data):
                image.put(block, offset // PAGE_BYTES, data)
                answer = None
            case events.RamZeroPage(block, offset):
                image.put(block, offset // PAGE_BYTES, None)
                answer = None
            case events.RamXbzrle(block, offset, encoded):
                image.patch(block, offset // PAGE_BYTES, encoded)
                answer = None
            case _:
                answer = yield want


def _ended(seen: Seen, error: RemoteProtocolError | None, eaten: int) -> Seen:
    if error is not None:
        seen.error, seen.at = error.what, error.offset
    seen.eaten = eaten
    return seen


class Core:
    """Memory, control segment and a C reader; `run` may be called again and again."""

    first_wins = False
    placement = Placement.COPY

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._exit = contextlib.ExitStack()
        self.geometry = Geometry.of(blocks, SHARDS, STRIPE_BYTES)
        self.control = Control(self._map(control_bytes(SHARDS)))
        self._exit.callback(self.control.release)
        self.control.init(SHARDS, os.getpid())
        self.control.publish(self.geometry, self.placement)
        self.pool = self._map(SHARDS * POOL_BYTES_PER_SHARD)
        size = self.control.n_bits // 8
        bits = self._map(3 * size)
        self.received, self.requested, self.written = (
            Bitmap(bits, number * size, size) for number in range(3)
        )
        for bitmap in (self.received, self.requested, self.written):
            self._exit.callback(bitmap.release)
        self._fds = [self._memory(block) for block in blocks]
        self.stop = Stop()
        self._exit.callback(self.stop.close)

    def __enter__(self) -> Core:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _map(self, size: int, fd: int = -1) -> mmap.mmap:
        return self._exit.enter_context(mmap.mmap(fd, size))

    def _memory(self, block: RamBlock) -> int:
        fd = os.memfd_create("wire-case")
        self._exit.callback(os.close, fd)
        os.truncate(fd, block.size)
        return fd

    @contextlib.contextmanager
    def _wire(self):
        """(our end, a reader of the other)"""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            stream = Stream(theirs.fileno(), self.stop, timeout_ms=0)
            ram = Ram(stream, self.control, self.received, self.requested, self.pool, self.stop)
            for index, fd in enumerate(self._fds):
                ram.use_block(index, fd)
            try:
                yield ours, ram, stream
            finally:
                ram.release()

    def run(self, pieces: Iterable[bytes]) -> Seen:
        before = self.control.totals
        with self._wire() as (ours, ram, stream):
            self.prepare(ram)
            sections: list[int] = []
            error, eaten = None, 0
            for piece in pieces:
                eaten += len(piece)
                error = self._give(ours, ram, stream, piece, sections)
                if error:
                    break
            self.settle(ram)
            seen = self._look(sections)
            self.reset(ram)
        now = self.control.totals
        seen.normal = now.normal - before.normal
        seen.duplicate = now.duplicate - before.duplicate
        return _ended(seen, error, eaten)

    def _give(self, ours, ram, stream, piece: bytes, sections) -> RemoteProtocolError | None:
        """Sends as the socket takes it; the error of the record that was refused."""
        while piece:
            piece = piece[ours.send(piece) :]
            try:
                while (outcome := ram.records()) in (Records.EOS, Records.FLUSH):
                    if outcome is Records.EOS:
                        sections.append(stream.offset)
            except NotYet:
                continue
            return bad_record(outcome, ram, self.geometry.blocks)
        return None

    def _look(self, sections: list[int]) -> Seen:
        """Reads the segments without making pages of holes."""
        memory, received = {}, {}
        for index, block in enumerate(self.geometry.blocks):
            memory[block.name] = os.pread(self._fds[index], block.size, 0)
            first = self.control.block(index)[2]
            received[block.name] = [n for n in range(block.pages) if self.received.test(first + n)]
        return Seen(memory, received, sections)

    def prepare(self, ram: Ram) -> None: ...

    def settle(self, ram: Ram) -> None: ...

    def reset(self, ram: Ram) -> None: ...


class Precopy(Core):
    """Pages go straight into the segments."""

    def reset(self, ram: Ram) -> None:
        self.received.clear(0, self.received.bits)
        for fd, block in zip(self._fds, self.geometry.blocks, strict=True):
            os.truncate(fd, 0)
            os.truncate(fd, block.size)


class ReferencePostcopy(Reference):
    """The same from LISTENING on, and of postcopy-preempt's channel."""

    first_wins = True


class Postcopy(Core):
    """Pages go through tmp pages and rings; placement loops make them visible."""

    first_wins = True

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        super().__init__(blocks)
        self.shards = [self._shard(index) for index in range(SHARDS)]
        for shard in self.shards:
            thread = threading.Thread(target=shard.place_loop, daemon=True)
            thread.start()
            self._exit.callback(thread.join)
            self._exit.callback(shard.stop)

    def _shard(self, index: int) -> Shard:
        uffd = Uffd.open()
        self._exit.callback(uffd.close)
        pool = memoryview(self.pool)[index * POOL_BYTES_PER_SHARD :][:POOL_BYTES_PER_SHARD]
        self._exit.callback(pool.release)
        sizes = [block.size for block in self.geometry.blocks]
        mappings = list(map(self._map, sizes, self._fds))
        shard = Shard(self.control, index, self.received, self.requested, self.written, pool, uffd)
        self._exit.callback(shard.release)
        for block, (mapping, fd) in enumerate(zip(mappings, self._fds, strict=True)):
            shard.add_block(block, mapping, fd)
        return shard

    def prepare(self, ram: Ram) -> None:
        ram.enter_postcopy()

    def settle(self, ram: Ram) -> None:
        ram.drain()

    def reset(self, ram: Ram) -> None:
        for index, block in enumerate(self.geometry.blocks):
            ram.discard(index, 0, block.pages)
        ram.drain()


class Straight(Core):
    """`continue` in precopy: pages are received into their blocks.  What a run leaves there stays,
    as it does after a discard: only received pages are looked at."""

    placement = Placement.CONTINUE

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        super().__init__(blocks)
        self.aliases = []
        for fd, block in zip(self._fds, blocks, strict=True):
            self.aliases.append(Alias(fd, block.size))
            self._exit.callback(self.aliases[-1].close)

    def prepare(self, ram: Ram) -> None:
        ram.go_straight(self.written, self.aliases)

    def _look(self, sections: list[int]) -> Seen:
        seen = super()._look(sections)
        for block in self.geometry.blocks:
            visible = bytearray(block.size)
            for page in seen.received[block.name]:
                at = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
                visible[at] = seen.memory[block.name][at]
            seen.memory[block.name] = bytes(visible)
        return seen

    def reset(self, ram: Ram) -> None:
        for index, block in enumerate(self.geometry.blocks):
            ram.discard(index, 0, block.pages)


class StraightPostcopy(Straight):
    """The same from LISTENING on: a second arrival changes nothing."""

    first_wins = True

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        super().__init__(blocks)
        for index in range(SHARDS):
            shard = Shard(
                self.control, index, self.received, self.requested, self.written, self.pool, None
            )
            self._exit.callback(shard.release)
            for block, fd in enumerate(self._fds):
                shard.add_block(block, None, fd)
            shard.listen()
            thread = threading.Thread(target=shard.place_loop, daemon=True)
            thread.start()
            self._exit.callback(thread.join)
            self._exit.callback(shard.stop)

    def prepare(self, ram: Ram) -> None:
        super().prepare(ram)
        ram.enter_postcopy()

    def settle(self, ram: Ram) -> None:
        ram.drain()


class Awaited(Postcopy):
    """Postcopy in which a guest has asked for every page: each goes through the urgent ring too."""

    def prepare(self, ram: Ram) -> None:
        super().prepare(ram)
        self.requested.set(0, self.requested.bits)


class Preempt(Core):
    """The channel of postcopy-preempt: pages are filled through a mapping of this process."""

    first_wins = True

    def prepare(self, ram: Ram) -> None:
        sizes = [block.size for block in self.geometry.blocks]
        self._own = OwnMapping(zip(self._fds, sizes, strict=True))
        self._main_wire = self._wire()
        _, main, _ = self._main_wire.__enter__()
        ram.read_preempt(main, self._own, self.written)

    def reset(self, ram: Ram) -> None:
        self._main_wire.__exit__(None, None, None)
        self._own.close()
        self.received.clear(0, self.received.bits)
        for fd, block in zip(self._fds, self.geometry.blocks, strict=True):
            os.truncate(fd, 0)
            os.truncate(fd, block.size)


class PreemptStraight(Straight):
    """The same with `continue`: pages are written into their blocks."""

    first_wins = True

    def prepare(self, ram: Ram) -> None:
        super().prepare(ram)
        self._main_wire = self._wire()
        _, main, _ = self._main_wire.__enter__()
        ram.read_preempt(main, None, self.written)

    def reset(self, ram: Ram) -> None:
        super().reset(ram)
        self._main_wire.__exit__(None, None, None)
