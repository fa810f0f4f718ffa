"""`sharded-pc bench`: rows, fields and clean exits.  What the figures are is no test's business."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_pc.bench.figures import compare, percentile
from sharded_pc.bench.report import Column, aligned

SHM = Path("/dev/shm")
SECONDS = 50
SMALL = ["--size", "8M", "--repeat", "2"]

pytestmark = pytest.mark.uffd


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _finish(_start(*arguments))


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sharded_pc", "bench", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True,
        start_new_session=True,
    )  # fmt: skip


def _finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Waits; nothing of it may be left in shared memory."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    left = [name for name in os.listdir(SHM) if name.startswith(f"bench-{process.pid}-")]
    assert not left
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def measured(*arguments: str) -> dict:
    """The one object on stdout."""
    done = bench(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert told["machine"].keys() == {"cpus", "kernel", "architecture", "python", "load"}
    assert told["commit"] is None or told["commit"]
    return told


def check_compared(figure: dict) -> None:
    """Product, floor and ratio, each with a spread around its median."""
    assert figure.keys() == {"product", "floor", "ratio"}
    for part in ("product", "floor"):
        assert 0 < figure[part]["min"] <= figure[part]["median"] <= figure[part]["max"]
    ratio = figure["product"]["median"] / figure["floor"]["median"]
    assert figure["ratio"]["median"] == pytest.approx(ratio)


def test_place_measures_every_batch_size_worker_count_and_repeat() -> None:
    told = measured("place", *SMALL, "--workers", "1,2", "--batch", "1,48")
    rows = {(r["feed"], r["workers"], r["batch"], r["what"], r["repeat"]) for r in told["runs"]}
    kinds = [("descriptors", 1), ("descriptors", 48), ("stream", None)]
    expected = {
        (feed, workers, batch, what, repeat)
        for (feed, batch), workers, what, repeat in itertools.product(
            kinds, (1, 2), ("product", "floor"), (0, 1)
        )
    }
    assert rows == expected
    assert len(told["runs"]) == len(expected)
    assert told["parameters"] == {
        "size": 8 << 20, "workers": [1, 2], "batch": [1, 48], "repeat": 2
    }  # fmt: skip


def test_place_results_hold_costs_rates_and_real_batches() -> None:
    told = measured("place", *SMALL, "--workers", "2", "--batch", "1,16")
    assert [(r["feed"], r["batch"]) for r in told["results"]] == [
        ("descriptors", 1), ("descriptors", 16), ("stream", None)
    ]  # fmt: skip
    for row in told["results"]:
        check_compared(row["us-per-page"])
        assert row["pages-per-second"] == pytest.approx(2 * row["pages-per-second-per-worker"])
    one, sixteen, stream = (row["pages-per-copy"] for row in told["results"])
    assert (one, sixteen) == (1, 16)
    assert 1 <= stream <= 64


def test_fault_measures_every_path_worker_count_thread_count_and_repeat() -> None:
    told = measured("fault", *SMALL, "--workers", "1,2", "--threads", "1,3")
    keys = ("path", "workers", "threads", "placement", "what", "repeat")
    rows = {tuple(row[key] for key in keys) for row in told["runs"]}
    placements = ("copy", "continue")
    axes = (("service", "local"), (1, 2), (1, 3), placements, ("product", "floor"), (0, 1))
    assert rows == set(itertools.product(*axes))
    assert len(told["runs"]) == len(rows)
    for row in told["runs"]:
        order = [row[f"p{p}-us"] for p in ("50", "90", "99", "99.9")]
        assert order == sorted(order)
        assert row["ns"] > 0


def test_fault_results_compare_latency_and_rate() -> None:
    told = measured("fault", *SMALL, "--workers", "2", "--threads", "2")
    assert [(row["path"], row["placement"]) for row in told["results"]] == [
        ("service", "copy"), ("service", "continue"), ("local", "copy"), ("local", "continue")
    ]  # fmt: skip
    for row in told["results"]:
        for figure in ("p50-us", "p90-us", "p99-us", "p99.9-us", "faults-per-second"):
            check_compared(row[figure])


def test_fault_of_one_placement_only() -> None:
    told = measured("fault", *SMALL, "--workers", "1", "--threads", "1", "--placement", "continue")
    assert {row["placement"] for row in told["runs"]} == {"continue"}
    assert told["parameters"]["placements"] == ["continue"]


@pytest.mark.parametrize(
    ("what", "headers"),
    [
        (["place", "--batch", "16"], ["product us/page", "product/floor", "pages/s/worker"]),
        (
            ["fault", "--threads", "1", "--placement", "copy"],
            ["placement", "p50 us", "p99.9 us", "p50 ratio", "faults/s"],
        ),
    ],
    ids=["place", "fault"],
)
def test_table(what: list[str], headers: list[str]) -> None:
    done = bench(*what, "--size", "8M", "--repeat", "1", "--workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"bench {what[0]}: 8 MiB, 1 repeats")
    assert all(header in lines[3] for header in headers)
    assert len(lines) == 4 + 2
    assert len({len(line) for line in lines[3:]}) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["place", "--batch", "0"],
        ["place", "--batch", "65"],
        ["place", "--workers", "1,,2"],
        ["place", "--workers", "65"],
        ["place", "--size", "2M", "--workers", "2"],
        ["place", "--threads", "1"],
        ["fault", "--size", "1T"],
        ["fault", "--size", "0"],
        ["fault", "--threads", "x"],
        ["fault", "--repeat", "0"],
        ["fault", "--batch", "1"],
        ["fault", "--placement", "move"],
    ],
    ids=" ".join,
)
def test_bad_options(arguments: list[str]) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
@pytest.mark.parametrize("what", ["place", "fault"])
def test_interrupted_it_leaves_nothing(what: str, number: signal.Signals) -> None:
    process = _start(what, "--size", "16M", "--repeat", "1000")
    pool = SHM / f"bench-{process.pid}-1%bitmaps"
    while not pool.exists():  # its workers have started
        assert process.poll() is None
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    done = _finish(process)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_percentiles_are_values_that_occurred() -> None:
    assert [percentile(range(1000), p) for p in (50, 99, 99.9)] == [500, 990, 999]
    assert percentile([7], 99.9) == 7


def test_ratios_are_of_medians_and_spread_over_pairs() -> None:
    found = compare([2.0, 8.0, 6.0], [1.0, 2.0, 4.0])
    assert found["ratio"] == {"median": 3.0, "min": 1.5, "max": 4.0}


def test_cells_and_columns() -> None:
    result = {"n": None, "us": compare([2.0, 3.0], [1.0, 1.0])}
    cells = [Column("", "n").cell(result)]
    cells += [Column("", "us", form, 1).cell(result) for form in ("ratio", "both")]
    assert cells == ["-", "2.5 (2.0..3.0)", "2.5 / 1.0"]
    assert aligned(["word", "n"], [["a", "100"]]) == ["word    n", "a     100"]
