"""A report as a picture: panels with lines, each point a median between its least and greatest.

matplotlib is looked for only when a picture is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sharded_pc.errors import UsageError

SUFFIXES = (".png", ".svg")
INSTALL = "pip install 'sharded_pc[bench]'"
PANEL_INCHES = (6.0, 5.2)
DOTS_PER_INCH = 120


def _all_results(told: dict) -> list[dict]:
    return told["results"]


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes.  `figure` names a spread ({"median", "min", "max"}), or several by what was
    measured ({"product": spread, ..., "ratio": ...}), of every result row."""

    title: str
    x: str
    x_axis: str
    figure: str
    y_axis: str
    """with its unit"""
    labels: tuple[str, ...]
    """keys that make a line of their own"""
    reference: str | None = None
    """what the product stands beside, drawn dotted"""
    reference_labels: tuple[str, ...] = ()
    """keys that it depends on"""
    rows: Callable[[dict], Iterable[dict]] = _all_results
    """the rows of a report that this panel shows"""
    log: bool = False
    """a logarithmic y axis; the x axis always is, for what is counted there doubles"""
    extra: Callable[..., None] | None = None
    """draws more: extra(axes, told)"""


def where(**wanted: object) -> Callable[[dict], list[dict]]:
    """Rows with these values."""
    return lambda told: [r for r in told["results"] if wanted.items() <= r.items()]


def check(file: str, panels: Sequence[Panel]) -> None:
    """UsageError unless a picture of these panels can be written there."""
    path = Path(file)
    if not panels:
        raise UsageError("--plot: there is no picture of this measurement yet")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {file}: expected a file that ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {file}: there is no directory {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"--plot {file}: needs matplotlib; install it with `{INSTALL}`")


def write(file: str, told: dict, panels: Sequence[Panel]) -> None:
    """Draws a report; UsageError if the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    figure.suptitle(_title(told), fontsize=10)
    for number, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(rows, columns, number), panel, told)
    try:
        figure.savefig(file, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise UsageError(f"--plot {file}: {error.strerror}") from error


def _title(told: dict) -> str:
    machine, parameters = told["machine"], told["parameters"]
    return (
        f"sharded-pc bench {told['bench']}: {machine['cpus']} CPUs, Linux {machine['kernel']}, "
        f"Python {machine['python']}, load {machine['load']:.1f}\n"
        f"commit {told['commit'] or 'unknown'}, {parameters['repeat']} repeats, "
        "medians, bars from the least to the greatest"
    )


def _draw(axes, panel: Panel, told: dict) -> None:
    rows = list(panel.rows(told))
    axes.set_xscale("log", base=2)
    if panel.log:
        axes.set_yscale("log")
    for name, points in _lines(rows, panel).items():
        _errorbar(axes, points, label=name, marker="o", capsize=3)
    for name, points in _references(rows, panel).items():
        _errorbar(axes, points, label=name, linestyle=":", marker="s", color="0.4", capsize=3)
    if panel.extra is not None:
        panel.extra(axes, told)
    axes.set(title=panel.title, xlabel=panel.x_axis, ylabel=panel.y_axis)
    _ticks(axes, {row[panel.x] for row in rows}, panel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _ticks(axes, xs: set, panel: Panel) -> None:
    """Counts are whole numbers; what `extra` draws may go further than what was measured."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if panel.extra is None:
        axes.set_xticks(sorted(xs))
    if not panel.log:
        axes.set_ylim(bottom=0)


def _errorbar(axes, points: dict[object, dict], **style: object) -> None:
    xs = sorted(points)
    middle = [points[x]["median"] for x in xs]
    below = [points[x]["median"] - points[x]["min"] for x in xs]
    above = [points[x]["max"] - points[x]["median"] for x in xs]
    axes.errorbar(xs, middle, yerr=[below, above], **style)


def _lines(rows: list[dict], panel: Panel) -> dict[str, dict]:
    """{label: {x: spread}} of what was measured."""
    told_apart = [key for key in panel.labels if len({row[key] for row in rows}) > 1]
    lines: dict[str, dict] = {}
    for row in rows:
        value = row[panel.figure]
        name = _label(row, told_apart) or "product"
        lines.setdefault(name, {})[row[panel.x]] = value.get("product", value)
    return lines


def _references(rows: list[dict], panel: Panel) -> dict[str, dict]:
    """{label: {x: spread}} of what stands beside it, where that was measured more than once the
    middle of the medians within all the spreads."""
    found: dict[str, dict[object, list[dict]]] = {}
    for row in rows:
        spread = row[panel.figure].get(panel.reference)
        if spread is not None:
            name = " ".join([str(panel.reference), _label(row, panel.reference_labels)]).strip()
            found.setdefault(name, {}).setdefault(row[panel.x], []).append(spread)
    return {
        name: {x: _joined(spreads) for x, spreads in points.items()}
        for name, points in found.items()
    }


def _joined(spreads: list[dict]) -> dict:
    medians = sorted(spread["median"] for spread in spreads)
    return {
        "median": medians[len(medians) // 2],
        "min": min(spread["min"] for spread in spreads),
        "max": max(spread["max"] for spread in spreads),
    }


def _label(row: dict, keys: Sequence[str]) -> str:
    """'2 workers, continue'"""
    found = [(key, row[key]) for key in keys if row[key] is not None]
    return ", ".join(f"{n} {key}" if isinstance(n, int) else str(n) for key, n in found)
