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
        parser.add_argument(
            "--resumable", action="store_true", help="what --resume could take up as well"
        )
        parser.add_argument("--name", help="only this receiver")

    def run(self, args: argparse.Namespace) -> int:
        from sharded_pc import shm

        found = [each for each in shm.receivers() if args.name in (None, each.name)]
        for each in found:
            print(self._one(each, args))
        if not found:
            print(f"no receiver {args.name!r} here" if args.name else "nothing to clean")
        return int(ExitCode.COMPLETED)

    def _one(self, found, args: argparse.Namespace) -> str:
        from sharded_pc import runtime_folder, shm
        from sharded_pc.succession import looks_resumable

        what = f"{found.name}: {len(found.files)} files, {found.size >> 20} MiB"
        if found.alive:
            return f"{what}, alive"
        if found.kept and not args.kept:
            return f"{what}, kept (remove with --kept)"
        if looks_resumable(found.name) and not args.resumable:
            return f"{what}, resumable (--resume takes it up; remove with --resumable)"
        if args.list:
            return f"{what}, dead"
        if shm.remove(found, lambda: runtime_folder.clean(found.name)):
            return f"{what}, removed"
        return f"{what}, left alone: it has changed meanwhile"
