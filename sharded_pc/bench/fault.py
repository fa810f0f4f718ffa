"""How long a guest waits for a page that is there for the asking, and how many it gets per second.

`service`: a guest process touches missing pages; its worker asks for them through the request ring,
a C loop in the coordinator's place answers at once, the worker places and wakes.  The loop stands
in for return path, wire and source, so this is what the receiver itself costs.
`local`: the page was received already: the worker answers from the fault loop, nobody is asked.
With `copy` it is a zero page.  With `continue` it stands in memory, and so do its neighbours: an
answer maps up to 16 pages from the faulting one on, so later touches of those do not fault at all.
The floor of both is one process, a handler thread with a blocking read and one ioctl (a copy; zeros
for `local`) beside the touching threads, on shared memory of the same size, the same pages in the
same order; it is the same for both placements, which take turns as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools

from sharded_pc import host
from sharded_pc.bench import bare
from sharded_pc.bench.figures import PERCENTILES, compare, latencies_us
from sharded_pc.bench.guest import order_of
from sharded_pc.bench.plot import Panel, where
from sharded_pc.bench.report import Column
from sharded_pc.bench.rig import Rig
from sharded_pc.geometry import PAGE_BYTES, Placement
from sharded_pc.native.floor import BareLoop, Touched
from sharded_pc.shm import Segment

PATHS = ("service", "local")
KEYS = ("path", "workers", "threads", "placement")


@dataclasses.dataclass(frozen=True, slots=True)
class FaultSettings:
    """Size in bytes; one row for each path, placement, worker count and number of guest
    threads."""

    size: int = 128 << 20
    workers: tuple[int, ...] = (1, 2)
    threads: tuple[int, ...] = (1, 2)
    placements: tuple[str, ...] = ("copy", "continue")
    repeat: int = 5

    @property
    def pages(self) -> int:
        return self.size // PAGE_BYTES


async def measure(settings: FaultSettings) -> dict:
    """{"runs": [...], "results": [...]}; HostError, ShardError, GuestLost, WrongByte."""
    host.require_host()
    host.require_memory((1 + len(settings.placements)) * settings.size)
    names, runs = bare.names(), []
    with bare.bare_loop(next(names), settings.size) as (loop, segment):
        for workers in settings.workers:
            async with contextlib.AsyncExitStack() as stack:
                rigs = [
                    await stack.enter_async_context(
                        Rig(next(names), settings.size, workers, Placement(placement))
                    )
                    for placement in settings.placements
                ]
                for rig in rigs:
                    await rig.attach_guest()
                fault = _Fault(settings, workers, rigs, loop, segment)
                runs += await fault.all_rows()
    return {"runs": runs, "results": _results(runs)}


class _Fault:
    """The rows of one worker count."""

    def __init__(
        self,
        settings: FaultSettings,
        workers: int,
        rigs: list[Rig],
        loop: BareLoop,
        segment: Segment,
    ) -> None:
        self._settings, self._workers = settings, workers
        self._rigs = rigs
        self._loop, self._segment = loop, segment

    async def all_rows(self) -> list[dict]:
        rows = []
        for path, rig in itertools.product(PATHS, self._rigs):
            await self._pair(rig, path, self._settings.threads[0], -1)  # memory touched once
        for repeat in range(self._settings.repeat):
            each = itertools.product(self._settings.threads, PATHS, self._rigs)
            for threads, path, rig in each:
                rows += await self._pair(rig, path, threads, repeat)
        return rows

    async def _pair(self, rig: Rig, path: str, threads: int, repeat: int) -> list[dict]:
        product = await self._product(rig, path, threads, repeat)
        floor = await self._floor(rig, path, threads, repeat)
        row = {"path": path, "placement": str(rig.placement), "workers": self._workers}
        row |= {"threads": threads, "repeat": repeat}
        both = (("product", product), ("floor", floor))
        return [{**row, "what": what, **self._figures(touched)} for what, touched in both]

    async def _product(self, rig: Rig, path: str, threads: int, seed: int) -> Touched:
        if path == "service":
            touched = await rig.touch(seed, threads, bare.FILLING)
        else:
            assert rig.guest is not None
            expected = await rig.receive_all()
            touched = await rig.call(rig.guest.touch, seed, threads, expected)
        await rig.renew()
        return touched

    async def _floor(self, rig: Rig, path: str, threads: int, seed: int) -> Touched:
        order = order_of(self._settings.pages, seed)
        try:
            return await rig.call(self._touch_bare, order, threads, path == "local")
        finally:
            bare.punch(self._segment)

    def _touch_bare(self, order, threads: int, zero: bool) -> Touched:
        return self._loop.faults(order, threads, zero=zero)

    def _figures(self, touched: Touched) -> dict:
        rate = self._settings.pages / touched.ns * 1e9
        return {"ns": touched.ns, "faults-per-second": rate, **latencies_us(touched.latencies)}


def _results(runs: list[dict]) -> list[dict]:
    """One row for each path, worker count, number of threads and placement, over all repeats."""
    keys = dict.fromkeys(tuple(r[key] for key in KEYS) for r in runs)
    order = {path: number for number, path in enumerate(PATHS)}
    return [_result(runs, key) for key in sorted(keys, key=lambda k: (order[k[0]], *k[1:3]))]


def _result(runs: list[dict], key: tuple) -> dict:
    mine = [r for r in runs if tuple(r[k] for k in KEYS) == key]

    def found(figure: str) -> dict:
        values = [[r[figure] for r in mine if r["what"] == w] for w in ("product", "floor")]
        return compare(*values)

    figures = ["faults-per-second", *(f"p{p:g}-us" for p in PERCENTILES)]
    return dict(zip(KEYS, key, strict=True)) | {figure: found(figure) for figure in figures}


def run(settings: FaultSettings) -> dict:
    """Measures in an event loop of its own."""
    return asyncio.run(measure(settings))


COLUMNS = (
    Column("path", "path"),
    Column("workers", "workers"),
    Column("threads", "threads"),
    Column("placement", "placement"),
    *(Column(f"p{p:g} us", f"p{p:g}-us", "both", digits=1) for p in PERCENTILES),
    Column("p50 ratio", "p50-us", "ratio"),
    Column("p99 ratio", "p99-us", "ratio"),
    Column("faults/s", "faults-per-second", "both", digits=0),
    Column("rate ratio", "faults-per-second", "ratio"),
)
"""Two numbers are product / floor."""

_AXES = {
    "p50-us": ("Median wait", "us from fault to resumption"),
    "faults-per-second": ("Rate", "faults/s"),
}
PLOT = tuple(
    Panel(
        f"{title}, {path}", "threads", "guest threads", figure, axis, ("workers", "placement"),
        reference="floor", rows=where(path=path),
    )
    for figure, (title, axis) in _AXES.items()
    for path in PATHS
)  # fmt: skip
