"""Every fuzz target over its corpus and a fixed number of changed inputs: the same ones each time.
`make fuzz` goes on from there (tests/fuzz)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fuzz import corpora, native_targets, targets
from tests.fuzz.mutator import Mutator

EXECUTIONS = 4000
SLOW = {
    "incoming": 1200,
    "ram_records": 800,
    "preempt_records": 300,
    "channel_packets": 300,
    "packets": 2500,
    "ram": 2500,
    "discards": 2500,
}
"""Changed inputs for each target: some seconds."""
pytestmark = pytest.mark.timeout(150)  # the C core is built with sanitizers


@pytest.mark.parametrize("name", targets.NAMES)
def test_python(name: str) -> None:
    target, corpus = targets.load(name), corpora.read(name)
    for data in corpus:
        _run(target.one_input, data)
    for data in Mutator(name, corpus, target.TOKENS).inputs(_executions(name)):
        _run(target.one_input, data)


def _executions(name: str) -> int:
    return SLOW.get(name, EXECUTIONS)


def _run(one_input, data: bytes) -> None:
    try:
        one_input(data)
    except Exception as error:
        error.add_note(f"the input: {data!r}")
        raise


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("name", native_targets.TARGETS)
def test_native(name: str, tmp_path: Path) -> None:
    program = native_targets.build(name, tmp_path / name, libfuzzer=False)
    corpus = corpora.write(name, tmp_path / "corpus")
    command = [program, f"-runs={_executions(name)}", f"-artifact_prefix={tmp_path}/", corpus]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
