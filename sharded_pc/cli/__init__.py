"""The command line: one small class for each command, heavy imports only when a command runs.

A command has `name`, `help`, `add_arguments(parser)` and `run(args) -> exit code`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Sequence

from sharded_pc.errors import ExitCode, ShardedPcError
from sharded_pc.printable import PrintableFormatter, printable

COMMANDS = {
    "check": "sharded_pc.cli.check:Check",
    "receive": "sharded_pc.cli.receive:Receive",
    "run": "sharded_pc.cli.run:Run",
    "emulate": "sharded_pc.cli.emulate:Emulate",
    "guest": "sharded_pc.cli.guest:Guest",
    "status": "sharded_pc.cli.status:Status",
    "bench": "sharded_pc.cli.bench:Bench",
    "dump": "sharded_pc.cli.dump:Dump",
    "demo": "sharded_pc.cli.demo:Demo",
    "libvirt": "sharded_pc.cli.libvirt:Libvirt",
    "clean": "sharded_pc.cli.clean:Clean",
}
"""Command words and the classes behind them."""


def _load(path: str):
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharded-pc",
        description="Receive a QEMU guest by postcopy into RAM shared by several processes.",
        epilog="Exit codes: 0 completed, 1 failed, 2 usage, 3 the host cannot, 4 the source broke "
        "the protocol, 5 connection lost, 6 guest lost, 130/143 ended by SIGINT/SIGTERM.",
    )
    parser.add_argument(
        "--log-level", default="warning", choices=["debug", "info", "warning", "error"]
    )
    words = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for word, path in COMMANDS.items():
        command = _load(path)
        sub = words.add_parser(word, help=command.help, description=command.help)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind the first "--"."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("sharded-pc: %(levelname)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def failed(error: ShardedPcError) -> int:
    """Says so; the exit code."""
    print(printable(f"sharded-pc: {error}", keep="\n"), file=sys.stderr)
    return int(error.exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # What stands behind "--" is another program's; argparse would mix it with our options.
    head, tail = _split(words)
    args = parser.parse_args(head)
    if tail and not hasattr(args, "qemu"):
        parser.error(f"{args.command} takes no command behind --")
    args.qemu = tail
    _log_to_stderr(args.log_level)
    try:
        return args.run(args)
    except ShardedPcError as error:
        return failed(error)
    except BrokenPipeError:
        return int(ExitCode.FAILED)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, MemoryError) as error:
        print(printable(f"sharded-pc: {error or 'out of memory'}"), file=sys.stderr)
        return int(ExitCode.HOST)
