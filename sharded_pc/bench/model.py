"""The universal scalability law, fitted to measured rates, and what it predicts.

X(N) = lambda N / (1 + sigma (N - 1) + kappa N (N - 1)): lambda is the rate of one, sigma the part
that queues (contention), kappa the cost of each pair that must agree (coherency).  N. J. Gunther,
Guerrilla Capacity Planning (2007), equation 4.25 with the rate of one as a third parameter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

PARAMETERS = 3
NOT_ENOUGH = f"not enough points (fewer than {PARAMETERS})"
PREDICTION = "PREDICTION (not measured)"
PREDICTED = (16, 32, 64)


@dataclasses.dataclass(frozen=True, slots=True)
class Law:
    """A fitted law: `rate` of one per second, `residual` as a part of the measured rates (RMS)."""

    rate: float
    contention: float
    coherency: float
    points: int
    residual: float

    def at(self, n: int) -> float:
        """Per second, with n of them."""
        return _rate(self.rate, self.contention, self.coherency, n)


def _rate(rate: float, contention: float, coherency: float, n: int) -> float:
    return rate * n / (1 + contention * (n - 1) + coherency * n * (n - 1))


def fit(points: Mapping[int, float]) -> Law | None:
    """The law through {n: rate per second} with the least squares of relative errors of N / X(N),
    which is linear in 1, N - 1 and N (N - 1); sigma and kappa not below zero, as they are costs.
    None with fewer points than parameters."""
    if len(points) < PARAMETERS:
        return None
    found = [_law(points, terms) for terms in _choices()]
    return min((law for law in found if law is not None), key=lambda law: law.residual)


def _choices() -> list[tuple[int, ...]]:
    """Which terms are not zero: the constrained optimum has one of these sets."""
    costs = (1, 2)
    return [(0, *some) for count in range(3) for some in itertools.combinations(costs, count)]


def _law(points: Mapping[int, float], terms: Sequence[int]) -> Law | None:
    """None if the unconstrained fit of these terms leaves what is allowed."""
    rows = []
    for n, rate in points.items():
        base = (1.0, n - 1.0, n * (n - 1.0))
        rows.append([base[term] * rate / n for term in terms])
    solved = _least_squares(rows)
    if solved is None:
        return None
    weights = [0.0, 0.0, 0.0]
    for term, value in zip(terms, solved, strict=True):
        weights[term] = value
    if weights[0] <= 0 or min(weights) < 0:
        return None
    rate, contention, coherency = 1 / weights[0], weights[1] / weights[0], weights[2] / weights[0]
    errors = [_rate(rate, contention, coherency, n) / x - 1 for n, x in points.items()]
    residual = math.sqrt(sum(e * e for e in errors) / len(errors))
    return Law(rate, contention, coherency, len(points), residual)


def _least_squares(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """The x with the least |rows x - 1|, by the normal equations; None if they are singular."""
    size = range(len(rows[0]))
    full = [[*row, 1.0] for row in rows]
    table = [[sum(row[i] * row[j] for row in full) for j in (*size, -1)] for i in size]
    for i in size:
        pivot = max(range(i, len(table)), key=lambda k: abs(table[k][i]))
        table[i], table[pivot] = table[pivot], table[i]
        if abs(table[i][i]) < 1e-12:
            return None
        for k in size:
            if k != i:
                factor = table[k][i] / table[i][i]
                table[k] = [a - factor * b for a, b in zip(table[k], table[i], strict=True)]
    return [table[i][-1] / table[i][i] for i in size]


def told(points: Mapping[int, float]) -> dict:
    """For the report: parameters and, for worker counts nobody measured here, predictions."""
    law = fit(points)
    if law is None:
        return {"points": len(points), "not-fitted": NOT_ENOUGH, "predictions": []}
    return {
        "points": law.points,
        "lambda": law.rate,
        "sigma": law.contention,
        "kappa": law.coherency,
        "rms-relative-residual": law.residual,
        "predictions": [
            {"workers": n, "pages-per-second": law.at(n), "kind": PREDICTION}
            for n in PREDICTED
            if n not in points
        ],
    }


def law_of(told: Mapping) -> Law | None:
    """What told() told of."""
    if "lambda" not in told:
        return None
    keys = ("lambda", "sigma", "kappa", "points", "rms-relative-residual")
    return Law(*(told[key] for key in keys))
