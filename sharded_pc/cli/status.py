"""`sharded-pc status NAME`."""

from __future__ import annotations

import argparse
import json
import time

from sharded_pc.errors import ExitCode, UsageError


class Status:
    """Shows a receiver from outside, by its control segment; it is not disturbed."""

    name = "status"
    help = "show a receiver as `info migrate` does, plus its shards"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", metavar="NAME")
        parser.add_argument("--json", action="store_true", help="one object, as query-migrate")
        parser.add_argument("--watch", action="store_true", help="every second until it is over")

    def run(self, args: argparse.Namespace) -> int:
        from sharded_pc.observe.status import is_over
        from sharded_pc.state import MigrationStatus

        while True:
            info = read(args.name)
            print(json.dumps(info) if args.json else "\n".join(lines(info)), flush=True)
            if not args.watch or is_over(MigrationStatus(info["status"])):
                return int(ExitCode.COMPLETED)
            time.sleep(1)


def read(name: str) -> dict:
    """migration_info of a live or kept receiver; UsageError if there is none of that name."""
    from sharded_pc.observe.view import ReceiverView

    try:
        with ReceiverView(name) as view:
            return view.info()
    except FileNotFoundError:
        raise UsageError(
            f"no receiver {name!r} on this machine; `sharded-pc clean --list` names them"
        ) from None


def lines(info: dict) -> list[str]:
    """People's form: 'key: value', nested keys joined by a blank."""
    out = []
    for key, value in info.items():
        if isinstance(value, dict):
            out += [f"{key} {line}" for line in lines(value)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for row in value:
                out += [f"{key} " + ", ".join(f"{k} {v}" for k, v in row.items() if k != LONG)]
        else:
            out.append(f"{key}: {value}")
    return out


LONG = "postcopy-latency-dist"
