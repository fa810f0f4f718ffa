"""Some migrations through chaos (tests/chaos; `make chaos` runs more of them)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from sharded_pc.geometry import Placement
from sharded_pc.testing.faults import ENDS, Kind
from tests.chaos import lane, migration
from tests.chaos.plan import MISTAKES, Kill, Plan, Victims, plan_of

pytestmark = pytest.mark.uffd

SEEDS = (17, 22, 28, 103)
"""Many cuts, and workers killed, crashed and stopped."""
WHOLE = 273
"""Whole receivers too."""
STOPPED = 20103
"""A coordinator crashes, and its successor is stopped for a while."""


@pytest.fixture(autouse=True)
def _end_guests() -> Iterator[None]:
    yield
    lane.end()


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_guest_survives(seed, placement):
    result, line = lane.one(seed, placement=placement)
    assert result.outcome == "completed", f"{line}\n{result.detail}"


@pytest.mark.parametrize("placement", Placement)
def test_a_guest_survives_its_receiver(placement):
    """The coordinator is killed, and all of its successor; workers die and connections break."""
    result, line = lane.one(WHOLE, victims=Victims.ALL, placement=placement)
    assert result.outcome == "completed", f"{line}\n{result.detail}"
    assert result.counts["coordinators"] == 2


@pytest.mark.parametrize("placement", Placement)
def test_a_guest_survives_a_coordinator_that_stands_still(placement):
    result, line = lane.one(STOPPED, victims=Victims.ALL, placement=placement)
    assert result.outcome == "completed", f"{line}\n{result.detail}"
    assert result.counts["coordinators"] == 1
    assert result.counts["stop"]


def test_a_cut_before_the_switch_is_a_clean_failure():
    seed = next(seed for seed in range(1000) if breaks_early(plan_of(seed)))
    result, line = lane.one(seed)
    assert result.outcome == "failed cleanly", f"{line}\n{result.detail}"


def breaks_early(plan: Plan) -> bool:
    """In the first pass over the RAM."""
    first = min((f.at for f in plan.legs[0].weather.faults if f.kind in ENDS), default=1 << 40)
    return first < sum(block.size for block in plan.oracle.blocks) // 4


def test_a_wrong_byte_is_seen(monkeypatch):
    """The guest expects another page than the source has: chaos must not call that survived."""

    def other(attach, oracle, *rest) -> migration.Task:
        return Task(attach, dataclasses.replace(oracle, turned_share=0.5), *rest)

    Task = migration.Task
    monkeypatch.setattr(migration, "Task", other)
    result, _ = lane.one(SEEDS[0])
    assert not result.is_right
    assert "expected version" in result.outcome


def test_what_is_left_is_seen(monkeypatch):
    monkeypatch.setattr(migration.Receiver, "processes", lambda self: [1])
    monkeypatch.setattr("tests.receiver.GONE_S", 0.1)
    result, _ = lane.one(SEEDS[0], victims=Victims.NONE)
    assert not result.is_right


def test_the_same_seed_is_the_same_plan():
    assert plan_of(7) == plan_of(7)
    assert plan_of(7) != plan_of(8)


def test_plans_have_everything():
    """Each fault, each signal, each mistake; without kills the wire is the same."""
    plans = [plan_of(seed) for seed in range(200)]
    legs = [leg for plan in plans for leg in plan.legs]
    faults = [fault for leg in legs for fault in leg.weather.faults]
    kills = [f.note for f in faults if f.note] + [kill for leg in legs for kill in leg.kills]
    assert {fault.kind for fault in faults} == set(Kind)
    assert {kill.signal for kill in kills} == {"KILL", "SEGV", "STOP"}
    assert {mistake for leg in legs for mistake in leg.mistakes} == set(MISTAKES)
    assert sum(fault.kind in ENDS for fault in faults) + len(kills) > 3 * len(plans)
    for plan in plans[:20]:
        calm = plan_of(plan.seed, victims=Victims.NONE)
        assert not any(isinstance(f.note, Kill) for leg in calm.legs for f in leg.weather.faults)
