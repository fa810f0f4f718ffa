"""The preload library: makes an unmodified QEMU a guest of a receiver (preload.c tells how)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from sharded_pc.errors import HostError

FILE = "libsharded_pc_preload.so"


def library_path() -> Path:
    """Where the library is installed; HostError."""
    return installed(FILE)


def installed(file: str) -> Path:
    """A library of this package that LD_PRELOAD can name; HostError."""
    # Not beside this file: an editable install puts what was built into site-packages.
    path = Path(str(resources.files("sharded_pc.attach").joinpath(file))).absolute()
    if not path.is_file():
        raise HostError(f"{path} is missing: run `pip install --force-reinstall sharded_pc`")
    return _check_loadable(path)


def _check_loadable(path: Path) -> Path:
    if any(separator in str(path) for separator in " :"):
        raise HostError(f"LD_PRELOAD cannot name {path}; install into a folder without ' ' and ':'")
    return path


def environment(
    attach: str, segments: Sequence[str], *, timeout: float | None = None, bound: bool = False
) -> dict[str, str]:
    """What a guest's environment needs besides ours: `attach` is the path of the receiver's socket,
    `segments` the RAM files (paths, or names in shared memory) that it will map, all of them;
    `timeout` is in seconds for the hand-over.  A `bound` guest ends with its receiver as long as it
    may not touch its memory yet.  HostError if the library is missing."""
    others = os.environ.get("LD_PRELOAD")
    variables = {
        "LD_PRELOAD": f"{library_path()}:{others}" if others else str(library_path()),
        "SHARDED_PC_ATTACH": os.path.abspath(attach),
        "SHARDED_PC_SEGMENTS": ":".join(segments),
    }
    if timeout is not None:
        variables["SHARDED_PC_ATTACH_TIMEOUT"] = f"{timeout:g}"
    if bound:
        variables["SHARDED_PC_BOUND"] = "1"
    return variables
