"""What a person sees: progress while it runs, a summary at the end.  All on standard error.

With rich installed and a terminal there is one bar for each shard; otherwise a line every second.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from sharded_pc.geometry import Geometry
from sharded_pc.memory import GuestMemory

PERIOD_SECONDS = 0.25
LINE_SECONDS = 1.0


def mib(size: float) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def shard_pages(ram: Geometry) -> list[int]:
    """Pages of each shard."""
    pages = [0] * ram.shards
    for extent in ram.extents():
        pages[extent.shard] += extent.size // 4096
    return pages


class ShardProgress:
    """Pages received, for each shard, read off the received bitmap."""

    def __init__(self, memory: GuestMemory, ram: Geometry) -> None:
        self._memory = memory
        self._ram = ram
        self.totals = shard_pages(ram)

    def received(self) -> list[int]:
        counts = [0] * self._ram.shards
        first_bits = {
            b.name: self._memory.control.block(i)[2] for i, b in enumerate(self._ram.blocks)
        }
        for extent in self._ram.extents():
            first = first_bits[extent.block] + extent.offset // 4096
            counts[extent.shard] += self._memory.received.count(first, extent.size // 4096)
        return counts


class Progress:
    """`async with Progress(memory):` shows it until the block ends."""

    def __init__(self, memory: GuestMemory, *, enabled: bool = True) -> None:
        self._memory = memory
        self._enabled = enabled
        self._task: asyncio.Task | None = None
        self._over = asyncio.Event()

    async def __aenter__(self) -> Progress:
        if self._enabled:
            show = _bars if sys.stderr.isatty() and _has_rich() else _lines
            self._task = asyncio.create_task(show(self._memory, self._over))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._over.set()
        if self._task is not None:
            await self._task


def _has_rich() -> bool:
    with contextlib.suppress(ImportError):
        import rich.progress  # noqa: F401  (an optional extra: asked for, not used here)

        return True
    return False


async def _pause(over: asyncio.Event, seconds: float) -> bool:
    """Waits; true when it is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)
    return over.is_set()


def line(memory: GuestMemory, progress: ShardProgress) -> str:
    """'postcopy-active  61 %  shards 63 % 59 %  412 MiB  1201 faults'"""
    shares = [
        100 * got // max(total, 1)
        for got, total in zip(progress.received(), progress.totals, strict=True)
    ]
    whole = 100 * sum(progress.received()) // max(sum(progress.totals), 1)
    faults = sum(s.faults for s in memory.control.shards())
    each = " ".join(f"{share:3d} %" for share in shares)
    totals = memory.control.totals
    moved = mib(totals.transferred + totals.preempt_bytes)
    return f"{memory.control.status.value:16} {whole:3d} %  shards {each}  {moved}  {faults} faults"


async def _lines(memory: GuestMemory, over: asyncio.Event) -> None:
    progress = None
    while not await _pause(over, LINE_SECONDS):
        if memory.geometry is None:
            continue
        progress = progress or ShardProgress(memory, memory.geometry)
        print(line(memory, progress), file=sys.stderr, flush=True)


async def _bars(memory: GuestMemory, over: asyncio.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    while memory.geometry is None:
        if await _pause(over, PERIOD_SECONDS):
            return
    progress = ShardProgress(memory, memory.geometry)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = [
            bars.add_task(f"shard {i}", total=total, note="")
            for i, total in enumerate(progress.totals)
        ]
        while True:
            ended = await _pause(over, PERIOD_SECONDS)
            counts = progress.received()
            for index, task in enumerate(tasks):
                shard = memory.control.shard(index)
                note = f"{memory.control.status.value}, {shard.faults} faults"
                bars.update(task, completed=counts[index], note=note)
            if ended:
                return


def _bucket(index: int) -> str:
    low = 1 << index
    return f"{low} us" if low < 1000 else f"{low / 1000:.0f} ms"


def latency_lines(distribution: list[int]) -> list[str]:
    """A small histogram of the fault latency."""
    peak = max(distribution)
    if not peak:
        return []
    used = [i for i, n in enumerate(distribution) if n]
    lines = ["fault latency (from the fault being read to the guest being woken):"]
    for i in range(used[0], used[-1] + 1):
        bar = "#" * round(40 * distribution[i] / peak)
        lines.append(f"  {_bucket(i):>7} .. {_bucket(i + 1):>7}  {distribution[i]:7d}  {bar}")
    return lines


def summary(info: dict) -> str:
    """The end of a migration in a few lines."""
    ram, sharded = info["ram"], info["sharded"]
    seconds = max(info["total-time"] or 1, 1) / 1000
    lines = [
        f"{info['status']}: {mib(ram['total'])} of RAM in {len(info['blocks'])} blocks, "
        f"{seconds:.2f} s, {ram['transferred'] / seconds / 1e9:.2f} GB/s off the wire",
        f"pages: {ram['normal']} with data, {ram['duplicate']} zero, "
        f"{ram['discarded-pages']} discarded, {ram['postcopy-requests']} requested",
        f"placement {sharded['placement']}: {sharded['placement-reason']}",
    ]
    for shard in sharded["shards"]:
        lines.append(
            f"shard {shard['shard']} (pid {shard['pid']}), after the switch: "
            f"{shard['pages']} pages, "
            f"{shard['zero-pages']} zero, {shard['faults']} faults, "
            f"{shard['late-faults']} of them late, {shard['copies']} copies, "
            f"{shard['mapped-pages']} pages mapped ahead"
            + (f"; {shard['restarts']} workers were lost and replaced" if shard["restarts"] else "")
        )
    return "\n".join([*lines, *latency_lines(info["postcopy-latency-dist"])])
