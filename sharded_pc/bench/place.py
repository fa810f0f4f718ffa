"""What it costs to place a page, by batch size and worker count.

`descriptors`: a C feeder hands descriptors of one batch size to the workers, so that a batch is one
UFFDIO_COPY; the floor is a thread that issues the same calls and does nothing else.
`stream`: RAM records in memory go over a Unix socket pair into the receiver's own reader and on to
the workers; the floor is one thread that receives and copies 64 pages at a time.
Both start from holes in memory that was touched before, product and floor in turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
from array import array
from collections.abc import Iterator

from sharded_pc import host
from sharded_pc.bench import bare
from sharded_pc.bench.figures import compare
from sharded_pc.bench.plot import Panel, where
from sharded_pc.bench.report import Column
from sharded_pc.bench.rig import BLOCK, Rig
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.native import oracle
from sharded_pc.native.core import now_ns
from sharded_pc.native.floor import BareLoop, Kind
from sharded_pc.shm import Segment
from sharded_pc.wire.constants import RamFlag

FIRST_HEADER = 8 + 1 + len(BLOCK)


@dataclasses.dataclass(frozen=True, slots=True)
class PlaceSettings:
    """Sizes in bytes; one row for each worker count and batch size."""

    size: int = 256 << 20
    workers: tuple[int, ...] = (1, 2)
    batch: tuple[int, ...] = (1, 4, 16, 64)
    repeat: int = 5

    @property
    def pages(self) -> int:
        return self.size // PAGE_BYTES


async def measure(settings: PlaceSettings) -> dict:
    """{"runs": [...], "results": [...]}; HostError, ShardError."""
    host.require_host()
    host.require_memory(2 * settings.size)
    names, runs = bare.names(), []
    records = _records(settings.pages)
    with bare.bare_loop(next(names), settings.size) as (loop, segment):
        for workers in settings.workers:
            async with Rig(next(names), settings.size, workers) as rig:
                place = _Place(settings, workers, rig, loop, segment, records)
                runs += await place.all_rows()
    return {"runs": runs, "results": _results(runs)}


def _records(pages: int) -> bytes:
    """One RAM section of all pages in order."""
    everything, versions = array("Q", range(pages)), bytes([1]) * pages
    data = oracle.records(BLOCK, 1, 0, everything, versions, go_on=False)
    return data + RamFlag.EOS.to_bytes(8, "big")


class _Place:
    """The rows of one worker count."""

    def __init__(
        self,
        settings: PlaceSettings,
        workers: int,
        rig: Rig,
        loop: BareLoop,
        segment: Segment,
        records: bytes,
    ) -> None:
        self._settings, self._workers = settings, workers
        self._rig, self._loop, self._segment = rig, loop, segment
        self._data = records

    async def all_rows(self) -> list[dict]:
        rows = []
        await self._warm_up()
        for repeat in range(self._settings.repeat):
            for batch in self._settings.batch:
                rows += await self._descriptors(batch, repeat)
            rows += await self._streams(repeat)
        return rows

    async def _warm_up(self) -> None:
        """Memory that the host gave once is cheaper ever after: both sides touch all of theirs."""
        await self._rig.feed(Kind.PAGES, 64)
        await self._bare(self._loop.place, self._rig.stripe_pages, 64)
        await self._rig.renew()

    async def _descriptors(self, batch: int, repeat: int) -> list[dict]:
        copies = self._rig.copies()
        product = await self._rig.feed(Kind.PAGES, batch)
        copies = self._rig.copies() - copies
        await self._rig.renew()
        floor = await self._bare(self._loop.place, self._rig.stripe_pages, batch)
        return self._pair("descriptors", batch, repeat, product, floor, copies)

    async def _streams(self, repeat: int) -> list[dict]:
        copies = self._rig.copies()
        with self._sender() as sock:
            began = now_ns()
            await self._rig.call(self._rig.receive, sock.fileno())
            product = now_ns() - began
        copies = self._rig.copies() - copies
        await self._rig.renew()
        with self._sender() as sock:
            floor = await self._bare(self._loop.stream, sock.fileno(), FIRST_HEADER)
        return self._pair("stream", None, repeat, product, floor, copies)

    async def _bare(self, function, *arguments: int) -> int:
        try:
            return await self._rig.call(function, *arguments)
        finally:
            bare.punch(self._segment)

    @contextlib.contextmanager
    def _sender(self) -> Iterator[socket.socket]:
        """A socket from which a thread's records come."""
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=_send, args=(theirs, self._data))
        thread.start()
        try:
            yield ours
        finally:
            ours.close()
            thread.join()

    def _pair(
        self, feed: str, batch: int | None, repeat: int, product: int, floor: int, copies: int
    ) -> list[dict]:
        pages = self._settings.pages
        row = {"feed": feed, "workers": self._workers, "batch": batch, "repeat": repeat}
        figures = [("product", product, pages / max(copies, 1)), ("floor", floor, batch or 64)]
        return [
            {**row, "what": what, "ns": ns, "us-per-page": ns / pages / 1000, "pages-per-copy": per}
            for what, ns, per in figures
        ]


def _send(sock: socket.socket, data: bytes) -> None:
    with sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)


def _results(runs: list[dict]) -> list[dict]:
    """One row for each feed, worker count and batch size, over all repeats."""
    keys = dict.fromkeys((r["feed"], r["workers"], r["batch"]) for r in runs)
    return [_result(runs, *key) for key in sorted(keys, key=lambda k: (k[0], k[1], k[2] or 0))]


def _result(runs: list[dict], feed: str, workers: int, batch: int | None) -> dict:
    mine = [r for r in runs if (r["feed"], r["workers"], r["batch"]) == (feed, workers, batch)]
    us = {w: [r["us-per-page"] for r in mine if r["what"] == w] for w in ("product", "floor")}
    per_copy = [r["pages-per-copy"] for r in mine if r["what"] == "product"]
    found = compare(us["product"], us["floor"])
    rate = 1e6 / found["product"]["median"]
    return {
        "feed": feed,
        "workers": workers,
        "batch": batch,
        "us-per-page": found,
        "pages-per-copy": sorted(per_copy)[len(per_copy) // 2],
        "pages-per-second": rate,
        "pages-per-second-per-worker": rate / workers,
    }


def run(settings: PlaceSettings) -> dict:
    """Measures in an event loop of its own."""
    return asyncio.run(measure(settings))


COLUMNS = (
    Column("feed", "feed"),
    Column("workers", "workers"),
    Column("batch", "batch"),
    Column("pages/copy", "pages-per-copy", digits=1),
    Column("product us/page", "us-per-page", "product"),
    Column("floor us/page", "us-per-page", "floor"),
    Column("product/floor", "us-per-page", "ratio"),
    Column("pages/s", "pages-per-second", digits=0),
    Column("pages/s/worker", "pages-per-second-per-worker", digits=0),
)

PLOT = (
    Panel(
        "Placement, descriptors", "batch", "pages for each UFFDIO_COPY", "us-per-page", "us/page",
        ("workers",), reference="floor", rows=where(feed="descriptors"),
    ),
    Panel(
        "Placement, stream", "workers", "workers", "us-per-page", "us/page", ("feed",),
        reference="floor", rows=where(feed="stream"),
    ),
)  # fmt: skip
