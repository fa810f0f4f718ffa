"""What a client makes of a receiver's geometry: an offer that can be used, or AttachError."""

from __future__ import annotations

import pytest

from sharded_pc.attach import protocol
from sharded_pc.errors import AttachError
from sharded_pc.geometry import Geometry, RamBlock

RAM = Geometry.of([RamBlock("pc.ram", 16 << 20), RamBlock("pc.bios", 256 << 10)], 2)


def offered(mode: str | None = "missing", **changes: object) -> dict:
    message = protocol.geometry("guest0", RAM, mode)
    message["geometry"].update(changes)
    return message


def block(**changes: object) -> list:
    return [{"name": "pc.ram", "size": 4096, "page-size": 4096, "first-stripe": 0, **changes}]


@pytest.mark.parametrize("mode", [None, *protocol.MODES])
def test_offer(mode: str | None) -> None:
    assert protocol.check_geometry(offered(mode)) == protocol.Offer("guest0", RAM, mode)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 7},
        {"mode": "minor"},
        {"mode": ["missing"]},
        {"shards": 0},
        {"shards": 1.5},
        {"shards": True},
        {"stripe-size": "2M"},
        {"stripe-size": -1},
        {"blocks": None},
        {"blocks": [7]},
        {"blocks": {"name": 1}},
        {"blocks": block(name=None)},
        {"blocks": block(size="4096")},
        {"blocks": block(size=0)},
        {"blocks": block(size=4096.0)},
        {"blocks": block(**{"page-size": [4096]})},
    ],
)
def test_geometry_that_cannot_be_used(changes: dict) -> None:
    with pytest.raises(AttachError, match="the receiver's geometry cannot be used"):
        protocol.check_geometry(offered(**changes))
