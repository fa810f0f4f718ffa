"""`sharded-pc dump FILE`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, BinaryIO

from sharded_pc.cli import failed
from sharded_pc.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from sharded_pc.dump import Walk


class Dump:
    """Tells what stands in a stream, up to where it breaks."""

    name = "dump"
    help = (
        "explain a recorded stream (`receive --record FILE`, or QEMU's `migrate file:FILE`) "
        "message by message"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", metavar="FILE", help="a recording; -: standard input")
        parser.add_argument(
            "--json", action="store_true", help="one JSON object on stdout, a message a line"
        )

    def run(self, args: argparse.Namespace) -> int:
        from sharded_pc.dump import Walk

        try:
            with _opened(args.file) as file:
                walk = Walk(file)
                (_as_json if args.json else _as_text)(walk, args.file)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise UsageError(f"recording {args.file}: {error.strerror}") from error
        return int(ExitCode.COMPLETED) if walk.error is None else failed(walk.error)


def _opened(name: str) -> BinaryIO:
    if name == "-":
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    return open(name, "rb", buffering=0)


def _as_text(walk: Walk, name: str) -> None:
    from sharded_pc.dump import text

    for line in text.lines(walk.messages()):
        print(line)
    print()
    for line in text.summary(walk.totals.blocks.values()):
        print(line)
    state = "whole" if walk.error is None else "broken"
    print(f"{walk.kind} stream, {state}, {walk.size} bytes", flush=True)


def _as_json(walk: Walk, name: str) -> None:
    """Written as it is read: there may be more messages than memory."""
    print(f'{{"filename": {json.dumps(name)}, "kind": {json.dumps(walk.kind)}, "messages": [')
    for number, message in enumerate(walk.messages()):
        print(("," if number else " ") + json.dumps(message))
    print("],", json.dumps(_end(walk))[1:], flush=True)


def _end(walk: Walk) -> dict:
    error, totals = walk.error, walk.totals
    return {
        "status": "whole" if error is None else "broken",
        "size": walk.size,
        "machine": totals.machine,
        "blocks": list(totals.blocks.values()),
        "ram": totals.ram(),
        "counts": totals.counts,
        "error-desc": None if error is None else str(error),
        "error-offset": None if error is None else error.offset,
    }
