"""`sharded-pc guest [options] -- PROGRAM ARGS`."""

from __future__ import annotations

import argparse
import os
import pwd
import shutil

from sharded_pc.errors import HostError, UsageError

SECONDS = 30.0


class Guest:
    """Becomes a program whose accesses to a receiver's RAM wait for missing pages."""

    name = "guest"
    help = "run a program that maps a receiver's RAM (a vhost-user back-end) as its guest"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.usage = "sharded-pc guest [options] -- PROGRAM ARGS"
        parser.epilog = (
            "PROGRAM keeps this process's number, descriptors and environment; it may be started "
            "before the receiver."
        )
        parser.add_argument(
            "--name", help="the receiver whose RAM it may map; without it any receiver's"
        )
        parser.add_argument(
            "--attach", metavar="PATH", help="the receiver's socket for guests, if it has another"
        )
        parser.add_argument(
            "--user",
            help="the receiver's user, if it is neither this one nor root: that user can then "
            "write into this program's memory",
        )
        parser.add_argument(
            "--timeout",
            type=float,
            default=SECONDS,
            metavar="SECONDS",
            help=f"for the receiver of RAM that the program maps to listen ({SECONDS:g})",
        )
        parser.set_defaults(qemu=[])

    def run(self, args: argparse.Namespace) -> int:
        from sharded_pc import host
        from sharded_pc.attach import broker, program
        from sharded_pc.shm import check_name

        if args.name is not None:
            check_name(args.name)
        if not args.qemu:
            raise UsageError("the program is missing: sharded-pc guest [options] -- PROGRAM ARGS")
        path = shutil.which(args.qemu[0])
        if path is None:
            raise HostError(f"program {args.qemu[0]!r} is not there, or may not be run")
        program.check_loads(path)
        host.require_host(kernel_faults=True)
        attach = None if args.attach is None else os.path.abspath(args.attach)
        user = None if args.user is None else _uid(args.user)
        with broker.beside(
            name=args.name, attach=attach, user=user, seconds=args.timeout
        ) as socket_name:
            environment = {**os.environ, **program.environment(socket_name)}
            try:
                os.execve(path, args.qemu, environment)
            except OSError as error:
                raise HostError(f"start {path}: {error.strerror}") from error


def _uid(user: str) -> int:
    try:
        return int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"--user {user}: there is no such user") from None
