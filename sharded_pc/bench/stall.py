"""How long a guest stalls when something that serves it is lost.

A guest process touches pages one after the other, each of which faults, and the longest of its
waits is one sample; a case strikes in the middle.  `missing`: the page is at a source that answers
at once.  `received`: it is here (`continue`), and the guest's own worker has to map it.  Each case
is measured beside the same without it, in turns.  A wrong byte ends the benchmark.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sharded_pc import host
from sharded_pc.bench import bare
from sharded_pc.bench.page_source import FIRST_BYTE
from sharded_pc.bench.report import aligned
from sharded_pc.bench.stall_cases import CASES, Case, Scene
from sharded_pc.errors import UsageError
from sharded_pc.geometry import PAGE_BYTES

LEAST_PAGES = 1024
"""Of a sample: the loss comes in its middle, STRIKE_SECONDS after its begin."""
KEYS = ("case", "path", "placement", "workers")


@dataclasses.dataclass(frozen=True, slots=True)
class StallSettings:
    """`size`: bytes of RAM, each of which is missing once; `repeat`: samples of each case."""

    size: int = 256 << 20
    workers: tuple[int, ...] = (2,)
    placements: tuple[str, ...] = ("copy", "continue")
    repeat: int = 20
    cases: tuple[str, ...] = tuple(CASES)


def run(settings: StallSettings) -> dict:
    """{"runs": [...], "results": [...]}; UsageError, HostError, GuestLost (a wrong byte, too)."""
    samples = settings.repeat * (1 + len(settings.cases))
    if settings.size // PAGE_BYTES // samples < LEAST_PAGES:
        least = -(-samples * LEAST_PAGES * PAGE_BYTES >> 20)
        raise UsageError(f"--size: at least {least}M for --repeat {settings.repeat}")
    host.require_host()
    host.require_memory(settings.size)
    names, runs = bare.names(), []
    with tempfile.TemporaryDirectory(prefix="sharded-pc-stall-") as folder:
        for placement, workers in itertools.product(settings.placements, settings.workers):
            with Scene(Path(folder), next(names), placement, workers, settings.size) as scene:
                cases = [Case(scene), *(CASES[name](scene) for name in settings.cases)]
                runs += _samples(scene, settings.repeat, cases)
    return {"runs": runs, "results": _results(runs)}


def _samples(scene: Scene, repeat: int, cases: list[Case]) -> Iterator[dict]:
    """Pages are missing once; then all are here, and what the guest has mapped it forgets."""
    pages = scene.size // PAGE_BYTES
    part = pages // (repeat * len(cases))
    turns = list(itertools.product(range(repeat), cases))
    for number, (turn, case) in enumerate(turns):
        yield _sample(scene, case, "missing", turn, number * part, part)
    if scene.placement == "copy":
        return  # what is here faults no more
    rest = len(turns) * part
    if rest < pages:
        scene.guest.touch(0, 1, FIRST_BYTE, rest, pages - rest)
    for turn, case in turns:
        scene.guest.forget()
        yield _sample(scene, case, "received", turn, 0, pages)


def _sample(scene: Scene, case: Case, path: str, turn: int, first: int, count: int) -> dict:
    stall = scene.stall_ms(first, count, turn, case.strike)
    case.mend()
    row = {"case": case.name, "path": path, "placement": scene.placement}
    return row | {"workers": scene.workers, "repeat": turn, "stall-ms": stall}


def _results(runs: list[dict]) -> list[dict]:
    keys = dict.fromkeys(tuple(r[key] for key in KEYS) for r in runs)
    return [_result(runs, key) for key in keys]


def _result(runs: list[dict], key: tuple) -> dict:
    stalls = sorted(r["stall-ms"] for r in runs if tuple(r[k] for k in KEYS) == key)
    figures = {"samples": len(stalls), "p50-ms": stalls[len(stalls) // 2], "worst-ms": stalls[-1]}
    return dict(zip(KEYS, key, strict=True)) | figures


def text(told: dict) -> str:
    """The table, below what was done where."""
    machine, parameters = told["machine"], told["parameters"]
    head = [*KEYS, "samples", "p50 ms", "worst ms"]
    rows = [
        [*(str(r[k]) for k in (*KEYS, "samples")), f"{r['p50-ms']:.1f}", f"{r['worst-ms']:.1f}"]
        for r in told["results"]
    ]
    lines = [
        f"bench stall: {parameters['size'] >> 20} MiB, the longest wait of a guest for a page; "
        f"{parameters['repeat']} samples of each, in turns",
        f"{machine['cpus']} CPUs, Linux {machine['kernel']}, Python {machine['python']}, "
        f"load {machine['load']:.1f}, commit {told['commit'] or 'unknown'}",
        "",
        *aligned(head, rows),
    ]
    return "\n".join(lines)
