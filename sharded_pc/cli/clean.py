"""`sharded-pc clean`."""

from __future__ import annotations

import argparse

from sharded_pc.errors import ExitCode


class Clean:
    """Removes the shared memory of receivers that died; never a live one's."""

    name = "clean"
    help = "remove what dead receivers left"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--list", action="store_true", help="only say what is there")
        parser.add_argument("--kept", action="store_true", help="RAM left by --keep as well")
        parser.add_argument("--name", help="only this receiver")

    def run(self, args: argparse.Namespace) -> int:
        from sharded_pc import shm

        for found in shm.receivers():
            if args.name in (None, found.name):
                print(self._one(found, args))
        return int(ExitCode.COMPLETED)

    def _one(self, found, args: argparse.Namespace) -> str:
        from sharded_pc import shm

        what = f"{found.name}: {len(found.files)} files, {found.size >> 20} MiB"
        if found.alive:
            return f"{what}, alive"
        if found.kept and not args.kept:
            return f"{what}, kept (remove with --kept)"
        if args.list:
            return f"{what}, dead"
        shm.remove(found)
        return f"{what}, removed"
