"""`sharded-pc status [NAME]`."""

from __future__ import annotations

import argparse
import json
import time

from sharded_pc.errors import ExitCode, HostError, UsageError
from sharded_pc.printable import printable


class Status:
    """Shows a receiver from outside, by its control segment; it is not disturbed."""

    name = "status"
    help = "show a receiver as `info migrate` does, plus its shards; without NAME list them all"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", metavar="NAME", nargs="?")
        parser.add_argument(
            "--json", action="store_true", help="one object, as query-migrate; of all: an array"
        )
        parser.add_argument("--watch", action="store_true", help="every second until it is over")

    def run(self, args: argparse.Namespace) -> int:
        if args.name is None:
            if args.watch:
                raise UsageError("status --watch: say which receiver, as in status guest0 --watch")
            _say(listed(), args.json)
            return int(ExitCode.COMPLETED)
        return _show(args)


def _show(args: argparse.Namespace) -> int:
    from sharded_pc.observe.status import is_over
    from sharded_pc.state import MigrationStatus

    while True:
        info = read(args.name)
        _say(info, args.json)
        if not args.watch or is_over(MigrationStatus(info["status"])):
            return int(ExitCode.COMPLETED)
        time.sleep(1)


def _say(what: dict | list[dict], as_json: bool) -> None:
    if as_json:
        print(json.dumps(what), flush=True)
    elif isinstance(what, dict):
        print("\n".join(lines(what)), flush=True)
    else:
        print("\n".join(map(row, what)) or "no receiver here", flush=True)


def read(name: str) -> dict:
    """migration_info of a live or kept receiver; UsageError if there is none of that name."""
    from sharded_pc.observe.view import ReceiverView

    try:
        with ReceiverView(name) as view:
            return view.info()
    except FileNotFoundError:
        raise UsageError(
            f"no receiver {name!r} on this machine; `sharded-pc status` names them"
        ) from None


def listed() -> list[dict]:
    """Every receiver of this user; `status` is None where nothing can be read (any more)."""
    from sharded_pc import shm

    found = []
    for each in shm.receivers():
        try:
            status = read(each.name)["status"]
        except (HostError, UsageError):
            status = None
        found.append({"name": each.name, "state": each.state, "status": status, "size": each.size})
    return found


def row(receiver: dict) -> str:
    """'guest0: alive, postcopy-active, 4096 MiB'"""
    status, size = receiver["status"] or "unreadable", receiver["size"] >> 20
    return f"{receiver['name']}: {receiver['state']}, {status}, {size} MiB"


def lines(info: dict) -> list[str]:
    """People's form: 'key: value', nested keys joined by a blank."""
    out = []
    for key, value in info.items():
        if isinstance(value, dict):
            out += [f"{key} {line}" for line in lines(value)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for each in value:
                pairs = (f"{k} {printable(str(v))}" for k, v in each.items() if k != LONG)
                out.append(f"{key} " + ", ".join(pairs))
        else:
            out.append(f"{key}: {printable(str(value))}")
    return out


LONG = "postcopy-latency-dist"
