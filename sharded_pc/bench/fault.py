"""How long a guest waits for a page that is there for the asking, and how many it gets per second.

`service`: a guest process touches missing pages; its worker asks for them through the request ring,
a C loop in the coordinator's place answers at once, the worker places and wakes.  The loop stands
in for return path, wire and source, so this is what the receiver itself costs.
`local`: the page was received already, as zeros: the worker answers from the fault loop, nobody is
asked.
The floor of both is one process, a handler thread with a blocking read and one ioctl beside the
touching threads, on shared memory of the same size, the same pages in the same order.
"""

from __future__ import annotations

import asyncio
import dataclasses

from sharded_pc import host
from sharded_pc.bench import bare
from sharded_pc.bench.figures import PERCENTILES, compare, latencies_us
from sharded_pc.bench.guest import GuestProcess, order_of
from sharded_pc.bench.report import Column
from sharded_pc.bench.rig import Rig
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.native.floor import BareLoop, Kind, Touched
from sharded_pc.shm import Segment

PATHS = ("service", "local")


@dataclasses.dataclass(frozen=True, slots=True)
class FaultSettings:
    """Size in bytes; one row for each path, worker count and number of guest threads."""

    size: int = 128 << 20
    workers: tuple[int, ...] = (1, 2)
    threads: tuple[int, ...] = (1, 2)
    repeat: int = 5

    @property
    def pages(self) -> int:
        return self.size // PAGE_BYTES


async def measure(settings: FaultSettings) -> dict:
    """{"runs": [...], "results": [...]}; HostError, ShardError, GuestLost, WrongByte."""
    host.require_host()
    host.require_memory(2 * settings.size)
    names, runs = bare.names(), []
    with bare.bare_loop(next(names), settings.size) as (loop, segment):
        for workers in settings.workers:
            async with Rig(next(names), settings.size, workers) as rig:
                guest = await rig.attach_guest()
                fault = _Fault(settings, workers, rig, guest, loop, segment)
                runs += await fault.all_rows()
    return {"runs": runs, "results": _results(runs)}


class _Fault:
    """The rows of one worker count."""

    def __init__(
        self,
        settings: FaultSettings,
        workers: int,
        rig: Rig,
        guest: GuestProcess,
        loop: BareLoop,
        segment: Segment,
    ) -> None:
        self._settings, self._workers = settings, workers
        self._rig, self._guest = rig, guest
        self._loop, self._segment = loop, segment

    async def all_rows(self) -> list[dict]:
        rows = []
        for path in PATHS:
            await self._pair(path, self._settings.threads[0], -1)  # memory touched once
        for repeat in range(self._settings.repeat):
            for threads in self._settings.threads:
                for path in PATHS:
                    rows += await self._pair(path, threads, repeat)
        return rows

    async def _pair(self, path: str, threads: int, repeat: int) -> list[dict]:
        product = await self._product(path, threads, repeat)
        floor = await self._floor(path, threads, repeat)
        row = {"path": path, "workers": self._workers, "threads": threads, "repeat": repeat}
        both = (("product", product), ("floor", floor))
        return [{**row, "what": what, **self._figures(touched)} for what, touched in both]

    async def _product(self, path: str, threads: int, seed: int) -> Touched:
        expected = 0 if path == "local" else bare.FILLING
        if path == "local":
            await self._rig.feed(Kind.ZERO, self._rig.stripe_pages)
        touched = await self._rig.call(self._guest.touch, seed, threads, expected)
        await self._rig.renew()
        return touched

    async def _floor(self, path: str, threads: int, seed: int) -> Touched:
        order = order_of(self._settings.pages, seed)
        try:
            return await self._rig.call(self._touch_bare, order, threads, path == "local")
        finally:
            bare.punch(self._segment)

    def _touch_bare(self, order, threads: int, zero: bool) -> Touched:
        return self._loop.faults(order, threads, zero=zero)

    def _figures(self, touched: Touched) -> dict:
        rate = self._settings.pages / touched.ns * 1e9
        return {"ns": touched.ns, "faults-per-second": rate, **latencies_us(touched.latencies)}


def _results(runs: list[dict]) -> list[dict]:
    """One row for each path, worker count and number of threads, over all repeats."""
    keys = dict.fromkeys((r["path"], r["workers"], r["threads"]) for r in runs)
    order = {path: number for number, path in enumerate(PATHS)}
    return [_result(runs, *key) for key in sorted(keys, key=lambda k: (order[k[0]], *k[1:]))]


def _result(runs: list[dict], path: str, workers: int, threads: int) -> dict:
    mine = [r for r in runs if (r["path"], r["workers"], r["threads"]) == (path, workers, threads)]

    def found(figure: str) -> dict:
        values = [[r[figure] for r in mine if r["what"] == w] for w in ("product", "floor")]
        return compare(*values)

    figures = ["faults-per-second", *(f"p{p:g}-us" for p in PERCENTILES)]
    row = {"path": path, "workers": workers, "threads": threads}
    return row | {figure: found(figure) for figure in figures}


def run(settings: FaultSettings) -> dict:
    """Measures in an event loop of its own."""
    return asyncio.run(measure(settings))


COLUMNS = (
    Column("path", "path"),
    Column("workers", "workers"),
    Column("threads", "threads"),
    *(Column(f"p{p:g} us", f"p{p:g}-us", "both", digits=1) for p in PERCENTILES),
    Column("p50 ratio", "p50-us", "ratio"),
    Column("p99 ratio", "p99-us", "ratio"),
    Column("faults/s", "faults-per-second", "both", digits=0),
    Column("rate ratio", "faults-per-second", "ratio"),
)
"""Two numbers are product / floor."""
