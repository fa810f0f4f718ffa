"""What the receiver's own state costs with a guest of 1 TiB, without a byte of memory behind it.

    python -m benchmarks.state_at_1tib [--gib 1024] [--ranges 1000000] [--json]

The geometry is one block of 268 million pages in a sparse segment, with `continue` and nobody who
populates it; only the three bitmaps (32 MiB each) are real.  The discards come as a stream's
messages, 12 ranges each as QEMU sends them, through the parser into Incoming; every other page
group is discarded, so that the received bitmap falls into twice as many runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

from sharded_pc.errors import StreamEnded
from sharded_pc.geometry import PAGE_BYTES, Geometry, Placement, RamBlock
from sharded_pc.incoming import Incoming
from sharded_pc.memory import BITMAP_COUNT, GuestMemory
from sharded_pc.native.alias import Alias
from sharded_pc.native.guests import Guests
from sharded_pc.native.ram import Stop
from sharded_pc.state import MigrationStatus
from sharded_pc.wire import writer
from sharded_pc.wire.feed import read_stream

BLOCK = "pc.ram"
WORKERS = 8
RANGES_PER_MESSAGE = 12
"""MAX_DISCARDS_PER_COMMAND of QEMU's migration/postcopy-ram.c"""


class Steps:
    """Seconds of each step, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def take(self, name: str, function: Callable, *arguments: object):
        """Its result."""
        began = time.perf_counter()
        result = function(*arguments)
        self.seconds[name] = time.perf_counter() - began
        return result


class Nobody:
    """Incoming's receiver without workers, guests and return path."""

    def __init__(self, guests: Guests, aliases: list[Alias]) -> None:
        self.guests, self._aliases = guests, aliases

    def define(self, blocks: tuple[RamBlock, ...]) -> list[Alias]:
        return self._aliases

    def configured(self, machine: str) -> None: ...

    def open_return_path(self) -> None: ...

    def prepare_discard(self) -> None: ...

    def status_changed(self, status: MigrationStatus) -> None: ...


class Discards(Incoming):
    """An Incoming to which everything was precopied."""

    def _blocks(self, event) -> None:
        super()._blocks(event)
        pages = self._memory.geometry.total // PAGE_BYTES
        self._memory.received.set(0, pages)


def ranges(pages: int, count: int) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of `count` ranges that do not touch."""
    step = pages // count
    assert step >= 2, "more ranges than every other page"
    for number in range(count):
        yield number * step * PAGE_BYTES, max(step // 2, 1) * PAGE_BYTES


def stream(block: RamBlock, count: int) -> Iterator[bytes]:
    """A source's bytes up to the last discard."""
    yield writer.header() + writer.configuration("pc") + writer.open_return_path()
    yield writer.postcopy_advise() + writer.ram_setup([block])
    waiting: list[tuple[int, int]] = []
    for pair in ranges(block.pages, count):
        waiting.append(pair)
        if len(waiting) == RANGES_PER_MESSAGE:
            yield writer.discard(block.name, waiting)
            waiting = []
    if waiting:
        yield writer.discard(block.name, waiting)


def receive(memory: GuestMemory, file: BinaryIO) -> None:
    """Incoming over the stream, which ends behind the discards."""
    stop = Stop()
    alias = Alias(memory.blocks[0].fd, memory.blocks[0].size)
    try:
        nobody = Nobody(Guests(memory.control), [alias])
        Discards(memory, file.fileno(), stop, nobody).run()  # type: ignore[arg-type]
    except StreamEnded:
        return
    finally:
        alias.close()
        stop.close()


def parse(file: BinaryIO) -> int:
    """The parser alone: how many ranges its events hold."""
    feed, found = read_stream(), 0
    while data := file.read(1 << 16):
        found += sum(len(event.ranges) for event in feed.feed(data) if hasattr(event, "ranges"))
    return found


def recv_bitmap(memory: GuestMemory) -> bytes:
    """The body of a RECV_BITMAP: be64 size, little-endian words, be64 end mark."""
    segment, pages = memory._bitmap_segment, memory.geometry.blocks[0].pages
    assert segment is not None and sys.byteorder == "little"
    size = -(-pages // 64) * 8
    words = memoryview(segment.map)[:size]
    try:
        return b"".join([size.to_bytes(8, "big"), words, 0x0123456789ABCDEF.to_bytes(8, "big")])
    finally:
        words.release()


def runs(memory: GuestMemory, pages: int) -> int:
    """How many stretches of received and missing pages there are, one C call for each."""
    found = at = 0
    while at < pages:
        at += memory.received.run(at, pages - at)
        found += 1
    return found


def measure(gib: int, count: int) -> dict:
    """{"seconds": {step: ...}, ...}; HostError."""
    block, steps = RamBlock(BLOCK, gib << 30), Steps()
    geometry = Geometry.of((block,), WORKERS)
    memory = steps.take("create", GuestMemory.create, f"state-{os.getpid()}", WORKERS)
    try:
        steps.take("define", memory.define, geometry, Placement.CONTINUE)
        return _measure(steps, memory, block, count)
    finally:
        memory.unlink()
        memory.close()


def _measure(steps: Steps, memory: GuestMemory, block: RamBlock, count: int) -> dict:
    with tempfile.TemporaryFile() as file:
        file.writelines(stream(block, count))
        file.seek(0)
        parsed = steps.take("parse discards (Python parser alone)", parse, file)
        file.seek(0)
        steps.take("receive discards (Incoming, parser included)", receive, memory, file)
    assert parsed == count
    received = steps.take("count received pages", memory.received_pages)[0]
    discarded = sum(length for _, length in ranges(block.pages, count)) // PAGE_BYTES
    assert received == block.pages - discarded
    body = steps.take("received bitmap as RECV_BITMAP body", recv_bitmap, memory)
    found = steps.take("find runs (one call each)", runs, memory, block.pages)
    return {
        "pages": block.pages,
        "ranges": count,
        "received": received,
        "runs": found,
        "recv-bitmap-bytes": len(body),
        "bitmap-bytes": BITMAP_COUNT * (len(body) - 16),
        "seconds": steps.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=int, default=1024)
    parser.add_argument("--ranges", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    told = measure(args.gib, args.ranges)
    if args.json:
        print(json.dumps(told))
        return
    print(f"{told['pages']} pages, {told['ranges']} discards, {told['runs']} runs")
    for step, seconds in told["seconds"].items():
        print(f"{seconds * 1e3:10.1f} ms  {step}")


if __name__ == "__main__":
    main()
