"""Where inputs are: seeds in Python, the committed corpus, what a run of `make fuzz` has found."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import seeds

HERE = Path(__file__).parent
COMMITTED = HERE / "corpus"
GROWN = HERE.parent.parent / "build" / "fuzz"
"""Not in the tree."""


def read(target: str) -> list[bytes]:
    """Seeds and committed inputs, in the same order everywhere."""
    folder = COMMITTED / target
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return seeds.of(target) + [path.read_bytes() for path in found]


def write(target: str, folder: Path) -> Path:
    """All of these as files, for programs."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(read(target)):
        (folder / f"{number:04}").write_bytes(data)
    return folder
