"""What a benchmark says: one object for programs, one table for people."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def report(bench: str, settings) -> dict:
    """Where and with what it is measured; the figures are to follow.  `load` is the one-minute load
    average before: other programs' share shows in the spreads."""
    return {
        "bench": bench,
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "load": os.getloadavg()[0],
        },
        "commit": _commit(),
        "parameters": dataclasses.asdict(settings),
    }


def _commit() -> str | None:
    """Of the git checkout this package is run from, None if it is in none."""
    if not _git("ls-files", "--error-unmatch", "../__init__.py"):
        return None
    return _git("describe", "--always", "--dirty", "--exclude=*") or None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", HERE, *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """Of the table: `form` says what of a compared figure is shown."""

    header: str
    key: str
    form: str = "plain"
    """plain: no compared figure; spread: one that is compared with nothing; median: only its
    median; product, floor, ratio: median (least..greatest); both: the medians of product / floor"""
    digits: int = 2

    def cell(self, result: dict) -> str:
        value = result[self.key]
        if value is None:
            return "-"
        if self.form == "both":
            return " / ".join(
                self._number(value[which]["median"]) for which in ("product", "floor")
            )
        if self.form == "plain":
            return self._number(value)
        if self.form == "median":
            return self._number(value["median"])
        spread = value if self.form == "spread" else value[self.form]
        median, least, most = (self._number(spread[k]) for k in ("median", "min", "max"))
        return f"{median} ({least}..{most})"

    def _number(self, value: object) -> str:
        return f"{value:.{self.digits}f}" if isinstance(value, float) else str(value)


def text(told: dict, columns: Sequence[Column], *, head: str | None = None) -> str:
    """The table of a report, below two lines that say what was measured where; `head` is the
    first."""
    machine, parameters = told["machine"], told["parameters"]
    first = head or (
        f"bench {told['bench']}: {parameters['size'] >> 20} MiB, {parameters['repeat']} repeats, "
        "product and floor in turns; medians (least..greatest)"
    )
    lines = [
        first,
        f"{machine['cpus']} CPUs, Linux {machine['kernel']}, Python {machine['python']}, "
        f"load {machine['load']:.1f}, commit {told['commit'] or 'unknown'}",
        "",
        *aligned(
            [column.header for column in columns],
            [[column.cell(result) for column in columns] for result in told["results"]],
        ),
    ]
    return "\n".join(lines)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns: the first to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    return [_line(line, widths) for line in (head, *rows)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        f"{cell:>{width}}" if column else f"{cell:<{width}}"
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest])
