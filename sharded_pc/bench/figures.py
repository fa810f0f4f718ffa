"""Numbers from repeated measurements: medians, spreads, ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

PERCENTILES = (50.0, 90.0, 99.0, 99.9)


def percentile(ordered: Sequence[int], percent: float) -> int:
    """The value below which `percent` of a sorted sequence lies."""
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def latencies_us(nanoseconds: Sequence[int]) -> dict[str, float]:
    """{"p50-us": ..., "p99.9-us": ...}"""
    ordered = sorted(nanoseconds)
    return {f"p{p:g}-us": percentile(ordered, p) / 1000 for p in PERCENTILES}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(product: Sequence[float], floor: Sequence[float]) -> dict[str, dict[str, float]]:
    """Both spreads, and that of the ratios of each repeat to its own floor, where `median` is the
    ratio of the two medians."""
    ratios = spread([p / f for p, f in zip(product, floor, strict=True)])
    both = {"product": spread(product), "floor": spread(floor)}
    ratios["median"] = both["product"]["median"] / both["floor"]["median"]
    return {**both, "ratio": ratios}
