"""One process that runs one migration after the other; its guests outlive them."""

from __future__ import annotations

import contextlib
from typing import Any

from tests.chaos.guest import Guest
from tests.chaos.migration import Result, run
from tests.chaos.plan import plan_of

CUTS = ("cut", "reset", "silence")
KILLS = ("kill", "segv", "stop")
COUNTED = (*CUTS, "stall", *KILLS, "coordinators", "restarts", "pauses", "mistakes")

_guests: list[Guest] = []


def main(conn, options: dict) -> None:
    """Gets seeds, answers (Result, line) for each, until the other end is closed."""
    try:
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                conn.send(one(conn.recv(), **options))
    finally:
        end()  # they are deaf to what would end them otherwise


def end() -> None:
    for guest in _guests:
        guest.kill()
    _guests.clear()


def one(seed: int, **options: Any) -> tuple[Result, str]:
    """A migration with plan_of()'s options, and its line."""
    plan = plan_of(seed, **options)
    result = run(plan, _guests)
    parts = [f"seed={seed}", str(plan.placement), f"workers={plan.workers}"]
    parts += ["tcp" if plan.tcp else "unix", f"guests={plan.guests}"]
    parts += [f"{word}={result.counts[word]}" for word in COUNTED if result.counts[word]]
    parts += [f"visits={result.report.visits}", f"writes={result.report.written}"]
    return result, " ".join([*parts, f"{result.seconds:.2f}s", result.outcome])
