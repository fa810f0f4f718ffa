"""How the rate of demand paging grows with worker processes and guest threads.

The layout is that of the kernel's tools/testing/selftests/kvm/demand_paging_test.c: each thread
walks through a region of its own, and every fault is answered with data that is there.  The path is
`service` of bench fault: request ring, a C loop instead of wire and source, placement, wake.
`single` is what most others have: one userfaultfd and one handler thread in one process, with the
same pages in the same order.  Everything takes turns, in each repeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

from sharded_pc import host
from sharded_pc.bench import bare, model, published, report
from sharded_pc.bench.figures import latencies_us, spread
from sharded_pc.bench.guest import regions
from sharded_pc.bench.plot import Panel
from sharded_pc.bench.report import Column
from sharded_pc.bench.rig import Rig
from sharded_pc.errors import UsageError
from sharded_pc.geometry import PAGE_BYTES, Placement
from sharded_pc.native.floor import BareLoop, Touched
from sharded_pc.shm import Segment

KEYS = ("receiver", "placement", "workers", "threads")
SINGLE = ("single", None, None)
RATES = ("pages-per-second", "pages-per-second-per-worker", "pages-per-second-per-thread")


@dataclasses.dataclass(frozen=True, slots=True)
class ScaleSettings:
    """Sizes in bytes; one row for each placement, worker count and number of guest threads."""

    size: int = 256 << 20
    workers: tuple[int, ...] = (1, 2)
    threads: tuple[int, ...] = (1, 2, 4, 8)
    page_size: int = PAGE_BYTES
    placements: tuple[str, ...] = ("copy", "continue")
    repeat: int = 5

    @property
    def pages(self) -> int:
        return self.size // PAGE_BYTES


def check_page_size(text: str) -> int:
    """Bytes of '4K'; UsageError for all other sizes."""
    if text.upper() in ("4K", "4KIB", str(PAGE_BYTES)):
        return PAGE_BYTES
    raise UsageError(
        f"--page-size {text}: only 4K: the receiver places target pages of {PAGE_BYTES} bytes and "
        "refuses a source with huge pages (hugetlbfs), so there is no other size to measure"
    )


def run(settings: ScaleSettings) -> dict:
    """Measures in an event loop of its own."""
    return asyncio.run(measure(settings))


async def measure(settings: ScaleSettings) -> dict:
    """{"runs", "results", "model", "published"}; HostError, ShardError, GuestLost, WrongByte."""
    host.require_host()
    kinds = [(p, w) for w in settings.workers for p in settings.placements]
    host.require_memory((1 + len(kinds)) * settings.size)
    names = bare.names()
    async with contextlib.AsyncExitStack() as stack:
        loop, segment = stack.enter_context(bare.bare_loop(next(names), settings.size))
        rigs = []
        for placement, workers in kinds:
            rig = Rig(next(names), settings.size, workers, Placement(placement))
            rigs.append(await stack.enter_async_context(rig))
            await rig.attach_guest()
        runs = await _Scale(settings, rigs, loop, segment).all_rows()
    results = _results(runs)
    return {
        "runs": runs,
        "results": results,
        "model": _models(settings, results),
        "published": published.told(),
    }


class _Scale:
    """All rows: every rig is up the whole time, those that wait are asleep."""

    def __init__(
        self, settings: ScaleSettings, rigs: list[Rig], loop: BareLoop, segment: Segment
    ) -> None:
        self._settings, self._rigs = settings, rigs
        self._loop, self._segment = loop, segment

    async def all_rows(self) -> list[dict]:
        """The first round touches all memory and does not count."""
        await self._round(self._settings.threads[0], -1)
        rows = []
        for repeat in range(self._settings.repeat):
            for threads in self._settings.threads:
                rows += await self._round(threads, repeat)
        return rows

    async def _round(self, threads: int, repeat: int) -> list[dict]:
        rows = [self._row((*SINGLE, threads), repeat, await self._single(threads))]
        for rig in self._rigs:
            key = ("product", str(rig.placement), len(rig.memory.control.shards()), threads)
            rows.append(self._row(key, repeat, await self._product(rig, threads)))
        return rows

    async def _product(self, rig: Rig, threads: int) -> Touched:
        touched = await rig.touch(None, threads, bare.FILLING)
        await rig.renew()
        return touched

    async def _single(self, threads: int) -> Touched:
        order = regions(self._settings.pages, threads)
        try:
            return await self._rigs[0].call(self._touch_bare, order, threads)
        finally:
            bare.punch(self._segment)

    def _touch_bare(self, order, threads: int) -> Touched:
        return self._loop.faults(order, threads, zero=False)

    def _row(self, key: tuple, repeat: int, touched: Touched) -> dict:
        row = dict(zip(KEYS, key, strict=True)) | {"repeat": repeat, "ns": touched.ns}
        rate = self._settings.pages / touched.ns * 1e9
        parts = (1, row["workers"] or 1, row["threads"])
        rates = {name: rate / part for name, part in zip(RATES, parts, strict=True)}
        return row | rates | latencies_us(touched.latencies)


def _results(runs: list[dict]) -> list[dict]:
    """One row for each receiver and number of threads, over all repeats."""
    found: dict[tuple, list[dict]] = {}
    for row in runs:
        found.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    return [_result(k, found[k], found[(*SINGLE, k[3])]) for k in sorted(found, key=_rank)]


def _rank(key: tuple) -> tuple:
    """The product first, by workers, placement and threads."""
    receiver, placement, workers, threads = key
    known = [None, *map(str, Placement)]
    return receiver == "single", workers or 0, known.index(placement), threads


def _result(key: tuple, mine: list[dict], single: list[dict]) -> dict:
    row = dict(zip(KEYS, key, strict=True))
    figures = (*RATES, "p50-us", "p99-us")
    row |= {figure: spread([run[figure] for run in mine]) for figure in figures}
    return row | {"ratio-to-single": _ratio(mine, single) if mine is not single else None}


def _ratio(mine: list[dict], single: list[dict]) -> dict:
    """Of the medians, within the ratios of each repeat to its own."""
    rate = RATES[0]
    pairs = zip(mine, single, strict=True)
    ratios = spread([a[rate] / b[rate] for a, b in pairs])
    medians = [spread([run[rate] for run in runs])["median"] for runs in (mine, single)]
    return ratios | {"median": medians[0] / medians[1]}


# --- the law ---


def _models(settings: ScaleSettings, results: list[dict]) -> list[dict]:
    """For each placement the law of worker counts, with the most guest threads: they must be
    enough to keep the workers busy."""
    threads = max(settings.threads)
    return [
        {"placement": placement, "threads": threads, **model.told(_rates(rows))}
        for placement in map(str, Placement)
        if (rows := _product_rows(results, placement, threads))
    ]


def _product_rows(results: list[dict], placement: str, threads: int) -> list[dict]:
    wanted = {"receiver": "product", "placement": placement, "threads": threads}
    return [row for row in results if wanted.items() <= row.items()]


def _rates(rows: list[dict]) -> dict[int, float]:
    """{workers: median}"""
    return {row["workers"]: row[RATES[0]]["median"] for row in rows}


# --- what is told ---

COLUMNS = (
    Column("receiver", "receiver"),
    Column("placement", "placement"),
    Column("workers", "workers"),
    Column("threads", "threads"),
    Column("pages/s", "pages-per-second", "spread", digits=0),
    Column("pages/s/worker", "pages-per-second-per-worker", "median", digits=0),
    Column("pages/s/thread", "pages-per-second-per-thread", "median", digits=0),
    Column("p50 us", "p50-us", "median", digits=1),
    Column("p99 us", "p99-us", "median", digits=1),
    Column("ratio to single", "ratio-to-single", "spread"),
)


def text(told: dict) -> str:
    """The table, then the law and its predictions, then what others have published."""
    parameters = told["parameters"]
    head = (
        f"bench scale: {parameters['size'] >> 20} MiB in pages of {parameters['page_size']} bytes, "
        f"{parameters['repeat']} repeats, all in turns; medians (least..greatest)"
    )
    lines = [report.text(told, COLUMNS, head=head), ""]
    for law in told["model"]:
        lines += _law_lines(law)
    cpus = told["machine"]["cpus"]
    if max(parameters["workers"]) + max(parameters["threads"]) > cpus:
        lines.append(
            f"workers and guest threads share {cpus} CPUs here: what is fitted is their limit too"
        )
    return "\n".join([*lines, "", *published.lines()])


def _law_lines(law: dict) -> list[str]:
    name = f"scalability law over workers, {law['placement']}, {law['threads']} threads"
    if "not-fitted" in law:
        return [f"{name}: {law['not-fitted']}: {law['points']} worker counts"]
    exact = ", as many as parameters: no test of the law" if law["points"] == 3 else ""
    return [
        f"{name}: lambda {law['lambda']:.0f} pages/s, sigma {law['sigma']:.4f}, "
        f"kappa {law['kappa']:.5f}; RMS relative residual {law['rms-relative-residual']:.1%} "
        f"over {law['points']} points{exact}",
        *(
            f"  {p['kind']}: {p['workers']} workers {p['pages-per-second']:.0f} pages/s"
            for p in law["predictions"]
        ),
    ]


# --- what is drawn ---


def _at_most_threads(told: dict) -> list[dict]:
    threads = max(told["parameters"]["threads"])
    return [
        row for row in told["results"] if (row["receiver"], row["threads"]) == ("product", threads)
    ]


def _draw_published(axes, told: dict) -> None:
    for series, marker in zip(published.SINGLE, ("v", "<", ">"), strict=True):
        points = series.pages_per_second
        label = f"{published.CAVEAT}: {series.title}"
        axes.plot(list(points), list(points.values()), ":", marker=marker, color="0.5", label=label)


def _draw_laws(axes, told: dict) -> None:
    """Dashed; what is predicted as empty diamonds."""
    for number, law in enumerate(told["model"]):
        found, colour = model.law_of(law), f"C{number}"
        if found is None:
            axes.plot([], [], "--", color=colour, label=f"{law['placement']}: {law['not-fitted']}")
            continue
        xs = range(1, max(model.PREDICTED) + 1)
        label = f"{law['placement']}: law, RMS residual {found.residual:.1%}"
        axes.plot(xs, [found.at(n) for n in xs], "--", color=colour, label=label)
        predicted = {p["workers"]: p["pages-per-second"] for p in law["predictions"]}
        axes.plot(
            list(predicted), list(predicted.values()), "D", color=colour, fillstyle="none",
            label=f"{law['placement']}: {model.PREDICTION}",
        )  # fmt: skip


PLOT = (
    Panel(
        "Demand paging by guest threads", "threads", "guest threads (published: vCPUs)", RATES[0],
        "pages/s", ("receiver", "placement", "workers"), log=True, extra=_draw_published,
    ),
    Panel(
        "By workers, with the most guest threads", "workers", "workers", RATES[0], "pages/s",
        ("placement",), rows=_at_most_threads, log=True, extra=_draw_laws,
    ),
)  # fmt: skip
