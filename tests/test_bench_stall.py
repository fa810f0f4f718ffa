"""`sharded-pc bench stall`: rows, and that it measures what it says.  Figures are no test's."""

from __future__ import annotations

import pytest

from sharded_pc.bench.stall_cases import CASES
from sharded_pc.cli.bench import Stall
from tests.test_bench import bench, measured

pytestmark = pytest.mark.uffd


def test_results_are_of_each_case_in_turns() -> None:
    told = measured("stall", "--size", "16M", "--repeat", "2", "--case", "worker-killed")
    rows = [(r["placement"], r["path"], r["case"], r["repeat"]) for r in told["runs"]]
    cases = ("nothing", "worker-killed")
    assert rows == [
        (placement, path, case, repeat)
        for placement, path in (
            ("copy", "missing"), ("continue", "missing"), ("continue", "received"),
        )
        for repeat in range(2)
        for case in cases
    ]  # fmt: skip
    assert len(told["results"]) == 6
    for result in told["results"]:
        assert result["samples"] == 2 and 0 < result["p50-ms"] <= result["worst-ms"]


def test_the_table_names_what_was_done() -> None:
    done = bench("stall", "--size", "24M", "--repeat", "1", "--placement", "copy")
    assert done.returncode == 0, done.stderr
    assert "24 MiB" in done.stdout
    assert {line.split()[0] for line in done.stdout.splitlines()[-6:]} == {"nothing", *CASES}


def test_the_command_knows_all_cases() -> None:
    assert set(Stall.cases) == set(CASES)


def test_a_sample_needs_pages() -> None:
    done = bench("stall", "--size", "8M", "--repeat", "20")
    assert done.returncode == 2
    assert done.stderr == "sharded-pc: --size: at least 480M for --repeat 20\n"
