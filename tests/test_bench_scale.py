"""`sharded-pc bench scale`, the law fitted to it, and the pictures of all benches."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest

from sharded_pc.bench import bare, model, plot, published
from sharded_pc.bench.bare import FILLING
from sharded_pc.bench.guest import regions
from sharded_pc.bench.model import Law
from sharded_pc.bench.rig import Rig
from sharded_pc.errors import UsageError
from sharded_pc.geometry import PAGE_BYTES, Placement
from tests.test_bench import SMALL, bench, measured

PNG, SVG = b"\x89PNG\r\n\x1a\n", b"<?xml"


# --- the order of pages ---


@pytest.mark.parametrize(("pages", "threads"), [(12, 1), (12, 3), (13, 4), (3, 8)])
def test_each_toucher_walks_through_a_region_of_its_own(pages: int, threads: int) -> None:
    order = regions(pages, threads)
    assert sorted(order) == list(range(pages))
    for thread in range(threads):
        mine = list(order[thread::threads])
        assert mine == list(range(mine[0], mine[0] + len(mine))) if mine else thread >= pages


# --- the law ---


def law_points(law: Law, *workers: int) -> dict[int, float]:
    return {n: law.at(n) for n in workers}


@pytest.mark.parametrize(
    ("rate", "contention", "coherency"),
    [(100e3, 0.05, 0.002), (1e6, 0.3, 0.0), (5e4, 0.0, 0.01), (2e5, 0.0, 0.0)],
)
def test_the_fit_finds_the_parameters(rate: float, contention: float, coherency: float) -> None:
    known = Law(rate, contention, coherency, 0, 0.0)
    found = model.fit(law_points(known, 1, 2, 4, 8, 12))
    assert found is not None
    assert found.rate == pytest.approx(rate, rel=1e-6)
    assert found.contention == pytest.approx(contention, abs=1e-6)
    assert found.coherency == pytest.approx(coherency, abs=1e-6)
    assert (found.points, found.residual) == (5, pytest.approx(0, abs=1e-6))
    assert found.at(64) == pytest.approx(known.at(64), rel=1e-4)


def test_noise_shows_in_the_residual() -> None:
    known, noise = Law(100e3, 0.05, 0.002, 0, 0.0), random.Random(7)
    points = law_points(known, *range(1, 33))
    found = model.fit({n: x * (1 + noise.uniform(-0.1, 0.1)) for n, x in points.items()})
    assert found is not None
    assert 0.03 < found.residual < 0.1
    assert found.at(16) == pytest.approx(known.at(16), rel=0.1)


def test_more_than_linear_growth_is_no_negative_cost() -> None:
    found = model.fit({1: 100.0, 2: 250.0, 4: 600.0})
    assert found is not None
    assert (found.contention, found.coherency) == (0, 0)
    assert found.residual > 0.05


def test_too_few_points_are_said_to_be_too_few() -> None:
    told = model.told({1: 1e5, 2: 1.8e5})
    assert told == {
        "points": 2, "not-fitted": "not enough points (fewer than 3)", "predictions": []
    }  # fmt: skip
    assert model.law_of(told) is None


def test_predictions_are_marked_and_never_of_what_was_measured() -> None:
    law = Law(1e5, 0.1, 0.001, 0, 0.0)
    told = model.told(law_points(law, 1, 2, 4, 16))
    assert [p["workers"] for p in told["predictions"]] == [32, 64]
    assert {p["kind"] for p in told["predictions"]} == {"PREDICTION (not measured)"}
    assert told["predictions"][0]["pages-per-second"] == pytest.approx(law.at(32))
    assert model.law_of(told) == model.fit(law_points(law, 1, 2, 4, 16))


# --- a rig with `continue` ---


@pytest.mark.uffd
@pytest.mark.parametrize("placement", Placement)
def test_renewed_every_page_faults_again(placement: Placement) -> None:
    asyncio.run(check_renewed(placement))


async def check_renewed(placement: Placement) -> None:
    size, name = 8 << 20, f"{next(bare.names())}-{placement}"
    async with Rig(name, size, 2, placement) as rig:
        await rig.attach_guest()
        for _ in range(2):
            faults = sum(shard.faults for shard in rig.memory.control.shards())
            await rig.touch(None, 2, FILLING)
            after = sum(shard.faults for shard in rig.memory.control.shards())
            assert rig.memory.received_pages() == [size // PAGE_BYTES]
            await rig.renew()
            assert rig.memory.received_pages() == [0]
        assert after - faults >= size // PAGE_BYTES  # every page faulted in the second round, too


# --- the bench ---


@pytest.mark.uffd
def test_scale_measures_everything_beside_a_single_userfaultfd() -> None:
    told = measured("scale", *SMALL, "--workers", "1,2,3", "--threads", "1,2")
    keys = ("receiver", "placement", "workers", "threads")
    rows = [tuple(row[key] for key in keys) for row in told["results"]]
    product = itertools.product((1, 2, 3), ("copy", "continue"), (1, 2))
    assert rows == [("product", p, w, t) for w, p, t in product] + [
        ("single", None, None, 1), ("single", None, None, 2)
    ]  # fmt: skip
    assert len(told["runs"]) == 2 * len(rows)
    for row in told["results"]:
        rate = row["pages-per-second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        per_worker, per_thread = (row[f"pages-per-second-per-{w}"] for w in ("worker", "thread"))
        assert per_worker["median"] * (row["workers"] or 1) == pytest.approx(rate["median"])
        assert per_thread["median"] * row["threads"] == pytest.approx(rate["median"])
        assert (row["ratio-to-single"] is None) == (row["receiver"] == "single")
    assert told["parameters"]["page_size"] == PAGE_BYTES
    check_model(told["model"])
    assert len(told["published"]) == len(published.SINGLE)
    assert all("other machines" in p["kind"] and p["source"] for p in told["published"])


def check_model(laws: list[dict]) -> None:
    """Of both placements, through three points, with marked predictions."""
    assert [(law["placement"], law["threads"], law["points"]) for law in laws] == [
        ("copy", 2, 3), ("continue", 2, 3)
    ]  # fmt: skip
    for law in laws:
        assert law["rms-relative-residual"] >= 0
        assert [p["workers"] for p in law["predictions"]] == [16, 32, 64]


@pytest.mark.uffd
def test_scale_tells_a_table_and_draws(tmp_path: Path) -> None:
    file = tmp_path / "scale.svg"
    arguments = ["--size", "8M", "--repeat", "1", "--threads", "2", "--plot", str(file)]
    done = bench("scale", *arguments, "--workers", "1,2")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("bench scale: 8 MiB in pages of 4096 bytes, 1 repeats")
    assert all(word in lines[3] for word in ("pages/s/worker", "pages/s/thread", "ratio to single"))
    assert len({len(line) for line in lines[3:9]}) == 1
    assert "not enough points (fewer than 3): 2 worker counts" in done.stdout
    assert "published, other machines: one userfaultfd (Moorthy 2023)" in done.stdout
    drawn = file.read_bytes()
    assert drawn.startswith(SVG)
    assert len(drawn) > 20_000


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["scale", "--page-size", "2M"], "--page-size 2M: only 4K"),
        (["scale", "--size", "8M", "--plot", "x.pdf"], "expected a file that ends in .png or .svg"),
        (["place", "--plot", "/nowhere/x.png"], "there is no directory /nowhere"),
    ],
    ids=["page size", "suffix", "directory"],
)
def test_refused_before_it_is_measured(arguments: list[str], error: str) -> None:
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert error in done.stderr
    assert "Traceback" not in done.stderr


# --- pictures ---


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'sharded_pc\[bench\]'"):
        plot.check("x.png", panels_of("place"))


def spread(value: float) -> dict[str, float]:
    return {"median": value, "min": 0.9 * value, "max": 1.2 * value}


def report(bench_name: str, results: list[dict], **parameters: object) -> dict:
    machine = {"cpus": 2, "kernel": "6.1", "python": "3.11", "load": 0.5}
    parameters = {"repeat": 3, **parameters}
    told = {"bench": bench_name, "machine": machine, "commit": "abc", "parameters": parameters}
    return {**told, "results": results}


def fault_report() -> dict:
    figures = ("p50-us", "faults-per-second")
    axes = itertools.product(("service", "local"), (1, 2), (1, 2), ("copy", "continue"))
    both = {figure: {"product": spread(9), "floor": spread(7)} for figure in figures}
    keys = ("path", "workers", "threads", "placement")
    return report("fault", [dict(zip(keys, row, strict=True)) | both for row in axes])


def place_report() -> dict:
    both = {"us-per-page": {"product": spread(2), "floor": spread(1.5), "ratio": spread(1.3)}}
    feeds = [("descriptors", 1), ("descriptors", 16), ("stream", None)]
    rows = [{"feed": f, "batch": b, "workers": w} | both for f, b in feeds for w in (1, 2)]
    return report("place", rows)


def replay_report() -> dict:
    both = {"product": spread(2), "qemu": spread(1.5), "ratio": spread(1.3)}
    figures = {figure: both for figure in ("gb-per-second", "cpu-seconds-per-gib")}
    axes = itertools.product(("unix", "tcp"), (1, 2), ("copy", "continue"))
    keys = ("transport", "workers", "placement")
    same = {"channels": 0, "compression": "none", "tls": False}
    return report("replay", [dict(zip(keys, row, strict=True)) | same | figures for row in axes])


def scale_report() -> dict:
    law = Law(1e5, 0.1, 0.002, 0, 0.0)
    rows = [
        {"receiver": "product", "placement": "copy", "workers": n, "threads": t}
        | {"pages-per-second": spread(law.at(n))}
        for n in (1, 2, 4) for t in (1, 2)
    ]  # fmt: skip
    rows.append({"receiver": "single", "placement": None, "workers": None, "threads": 1})
    rows[-1]["pages-per-second"] = spread(5e4)
    fitted = {"placement": "copy", "threads": 2} | model.told(law_points(law, 1, 2, 4))
    return report("scale", rows, threads=[1, 2]) | {"model": [fitted]}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("name", ["fault", "place", "replay", "scale"])
def test_pictures_have_labels_units_and_what_was_compared(
    name: str, suffix: str, tmp_path: Path
) -> None:
    told, file = REPORTS[name](), tmp_path / f"picture{suffix}"
    panels = panels_of(name)
    plot.write(str(file), told, panels)
    drawn = file.read_bytes()
    assert drawn.startswith(PNG if suffix == ".png" else SVG)
    assert len(drawn) > 15_000
    if suffix == ".svg":  # text is drawn as glyphs, with the text itself beside it
        text = drawn.decode()
        wanted = {panel.y_axis for panel in panels} | {panel.title for panel in panels}
        wanted |= {"commit abc", *EXPECTED[name]}
        assert [word for word in wanted if word not in text] == []


REPORTS = {
    "fault": fault_report,
    "place": place_report,
    "replay": replay_report,
    "scale": scale_report,
}
EXPECTED = {
    "fault": ["2 workers, continue", "floor"],
    "place": ["2 workers", "floor"],
    "replay": ["tcp, copy", "qemu tcp"],
    "scale": ["PREDICTION (not measured)", "published, other machines", "RMS residual", "single"],
}


def panels_of(name: str) -> tuple[plot.Panel, ...]:
    from sharded_pc.bench import fault, place, replay, scale

    return {"fault": fault, "place": place, "replay": replay, "scale": scale}[name].PLOT
