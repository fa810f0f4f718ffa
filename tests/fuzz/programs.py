"""A target as a program with libFuzzer's command line: C by clang, Python by atheris."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

from tests.fuzz import corpora, native_targets, targets
from tests.fuzz.mutator import MOST_BYTES

ALL = (*targets.NAMES, *native_targets.TARGETS)
LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1")
"""Seconds and megabytes that one input may take."""
MOST_NATIVE_BYTES = 16384
"""Of native/replay.c too."""


def place(name: str) -> Path:
    return corpora.GROWN / name / "program"


def guided(name: str) -> list[str | Path] | None:
    """The command without folders; None if this machine lacks what would lead it."""
    if name in native_targets.TARGETS:
        if shutil.which("clang") is None:
            return None
        program = native_targets.build(name, place(name), libfuzzer=True)
        return [program, *_limits(name, MOST_NATIVE_BYTES)]
    if importlib.util.find_spec("atheris") is None:
        return None
    return [_script(name), *_limits(name, MOST_BYTES), f"-dict={_words(name)}"]


def _limits(name: str, most_bytes: int) -> tuple[str, ...]:
    return (*LIMITS, f"-artifact_prefix={corpora.GROWN / name}/", f"-max_len={most_bytes}")


def _script(name: str) -> Path:
    """libFuzzer starts itself anew to merge: what it starts must be one file."""
    python, script = shlex.quote(sys.executable), place(name)
    script.write_text(f'#!/bin/sh\nexec {python} -m tests.fuzz.guided {name} "$0" "$@"\n')
    script.chmod(0o755)
    return script


def _words(name: str) -> Path:
    path = corpora.GROWN / name / "words"
    lines = ("".join(f"\\x{byte:02x}" for byte in token) for token in targets.load(name).TOKENS)
    path.write_text("".join(f'"{line}"\n' for line in lines))
    return path
