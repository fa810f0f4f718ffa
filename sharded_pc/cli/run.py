"""`sharded-pc run INCOMING [options] -- QEMU ARGS`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import sys

from sharded_pc.cli.receive import Session, add_receiver_arguments, settings_of
from sharded_pc.errors import ExitCode


class Run:
    """Receives a migration and resumes its guest in a QEMU on the shared memory."""

    name = "run"
    help = "receive a migration and resume a QEMU guest on it"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_receiver_arguments(parser)
        parser.usage = (
            "sharded-pc run INCOMING [options] -- QEMU ARGS\n"
            "       sharded-pc run --resume NAME [options]"
        )
        parser.epilog = "QEMU ARGS: the destination's usual command line, program first."
        parser.set_defaults(qemu=[])

    def run(self, args: argparse.Namespace) -> int:
        return asyncio.run(_run(args))


UNKNOWN = "sharded-pc: the adopted QEMU has ended; its exit code is not known, 0 stands for it"


async def _run(args: argparse.Namespace) -> int:
    # The one JSON object has standard output for itself.
    stdout = sys.stderr.fileno() if args.json else None
    from sharded_pc.destination.process import QemuProcess
    from sharded_pc.qemu_args import check_arguments

    launch = functools.partial(QemuProcess.start, stdout=stdout)
    settings = dataclasses.replace(
        settings_of(args), runs=True, qemu=tuple(args.qemu), launch=launch
    )

    if settings.qemu or settings.incoming is not None:
        check_arguments(settings.qemu)
    session = Session(args, settings)
    return await session.run(_stay_with_guest)


async def _stay_with_guest(session: Session) -> int:
    """The guest runs on plain shared memory; this process stays its parent."""
    coordinator = session.coordinator
    await coordinator.retire()
    destination = coordinator.destination
    assert destination is not None
    await destination.leave_monitor()
    session.signals.call(destination.terminate)
    code = await destination.exited()
    if coordinator.resumes:
        print(UNKNOWN, file=sys.stderr)
    elif code and not session.signals.exit_code:
        print(f"sharded-pc: QEMU ended with {code}", file=sys.stderr)
    return session.signals.exit_code or code or int(ExitCode.COMPLETED)
