"""Fuzzes for a given time: `python -m tests.fuzz [--seconds N] [TARGET...]`, one after the other.

Goes on with the next target when one has failed; the input is left in build/fuzz/TARGET.  `--merge`
instead adds to tests/fuzz/corpus what earlier runs have found and it does not cover yet.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz import corpora, native_targets, programs, targets
from tests.fuzz.mutator import Mutator

BATCH = 2000
"""Executions between two looks at the clock where nothing leads them."""
MOST_COMMITTED = 3000
"""Bytes of one input in the tree."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(programs.ALL))
    parser.add_argument("--seconds", type=int, default=600, help="for each target (%(default)s)")
    parser.add_argument("--merge", action="store_true", help="what was found goes into the tree")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(programs.ALL):
        parser.error(f"no target {', '.join(sorted(unknown))}")
    failed = []
    for name in options.targets or programs.ALL:
        print(f"== {name}", flush=True)
        if not (_merge(name) if options.merge else _fuzz(name, options.seconds)):
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return bool(failed)


def _fuzz(name: str, seconds: int) -> bool:
    """True if all went well."""
    folder = corpora.write(name, corpora.GROWN / name / "corpus")
    command = programs.guided(name)
    if command is not None:
        return _run([*command, f"-max_total_time={seconds}", folder])
    print("neither atheris nor clang for it: not led by coverage", flush=True)
    batch = _native_batch if name in native_targets.TARGETS else _batch
    end, good, seeds = time.monotonic() + seconds, True, itertools.count()
    while good and time.monotonic() < end:
        good = batch(name, folder, next(seeds))
    return good


def _run(command: list[str | Path]) -> bool:
    return subprocess.run(command).returncode == 0


def _native_batch(name: str, folder: Path, seed: int) -> bool:
    program = programs.place(name)
    if seed == 0:
        native_targets.build(name, program, libfuzzer=False)
    prefix = f"-artifact_prefix={corpora.GROWN / name}/"
    return _run([program, f"-runs={BATCH}", f"-seed={seed}", prefix, folder])


def _batch(name: str, folder: Path, seed: int) -> bool:
    target = targets.load(name)
    for data in Mutator(f"{name} {seed}", corpora.read(name), target.TOKENS).inputs(BATCH):
        try:
            target.one_input(data)
        except Exception:
            traceback.print_exc()
            (folder.parent / "failed").write_bytes(data)
            return False
    return True


def _merge(name: str) -> bool:
    command = programs.guided(name)
    if command is None:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        known = corpora.write(name, Path(scratch) / "known")
        before = set(known.iterdir())
        if not _run(
            [*command, "-merge=1", "-use_counters=0", known, corpora.GROWN / name / "corpus"]
        ):
            return False
        for path in set(known.iterdir()) - before:
            if path.stat().st_size <= MOST_COMMITTED:
                (corpora.COMMITTED / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, corpora.COMMITTED / name)
    return True


if __name__ == "__main__":
    sys.exit(main())
