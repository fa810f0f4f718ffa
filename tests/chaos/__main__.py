"""``python -m tests.chaos``: migration after migration through chaos, a line for each."""

from __future__ import annotations

import argparse
import collections
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

from sharded_pc import processes
from sharded_pc.geometry import Placement
from tests.chaos import lane
from tests.chaos.lane import COUNTED, CUTS, KILLS
from tests.chaos.migration import Result
from tests.chaos.plan import Victims


def _results(args: argparse.Namespace) -> Iterator[tuple[Result, str]]:
    """As they come."""
    seeds = iter(range(args.seed, args.seed + args.number))
    placement = Placement(args.placement) if args.placement else None
    options = {"victims": Victims(args.kill), "placement": placement}
    lanes = [
        processes.start(lane.main, options, name=f"chaos-{number}")
        for number in range(min(args.jobs, args.number))
    ]
    busy = [conn for _, conn in lanes]
    for conn in busy:
        conn.send(next(seeds))
    try:
        while busy:
            for conn in wait(busy):
                yield conn.recv()
                if (seed := next(seeds, None)) is None:
                    busy.remove(conn)
                else:
                    conn.send(seed)
    finally:
        for process, conn in lanes:
            conn.close()
            process.join()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("-n", "--number", type=int, default=100, help="of migrations (100)")
    parser.add_argument("--seed", type=int, default=1, help="of the first one; others follow")
    parser.add_argument("--jobs", type=int, default=2, help="migrations at a time (2)")
    parser.add_argument("--placement", choices=list(Placement), help="default: as drawn")
    parser.add_argument("--kill", choices=list(Victims), default=Victims.ALL, help="who dies (all)")
    parser.add_argument(
        "--details", type=Path, default=Path("build/chaos"), metavar="DIR",
        help="what is known of migrations that went wrong (build/chaos/SEED)",
    )  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """0 if everything went as it may."""
    args, since = _arguments(), time.monotonic()
    totals: collections.Counter[str] = collections.Counter()
    wrong: list[int] = []
    for result, line in _results(args):
        print(line, flush=True)
        totals.update(result.counts)
        totals[result.outcome if result.is_right else "WRONG"] += 1
        totals["visits"] += result.report.visits
        if not result.is_right:
            wrong.append(result.seed)
            args.details.mkdir(parents=True, exist_ok=True)
            (args.details / str(result.seed)).write_text(result.detail)
    print(f"{args.number} migrations in {time.monotonic() - since:.0f} s: {_total(totals)}")
    if wrong:
        print(f"WRONG: seeds {wrong}", file=sys.stderr)
    return 1 if wrong else 0


def _total(totals: collections.Counter[str]) -> str:
    kills, cuts = (sum(totals[word] for word in words) for words in (KILLS, CUTS))
    words = ("completed", "failed cleanly", "WRONG")
    ends = ", ".join(f"{totals[word]} {word}" for word in words)
    detail = ", ".join(f"{totals[word]} {word}" for word in COUNTED)
    return f"{ends}; {cuts} cuts and {kills} kills ({detail}); {totals['visits']} pages checked"


if __name__ == "__main__":
    sys.exit(main())
