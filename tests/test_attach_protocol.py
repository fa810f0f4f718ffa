"""What a client makes of a receiver's geometry: an offer that can be used, or AttachError."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from sharded_pc.attach import protocol
from sharded_pc.attach.guest import Handle
from sharded_pc.errors import AttachError
from sharded_pc.geometry import Geometry, RamBlock
from tests.synthetic import Background

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


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("Gäste „voll“ \U0001f600", "Gäste „voll“ \U0001f600"),
        ('c:\\u00e4 "q"', 'c:\\u00e4 "q"'),
        ("\x1b[2J\x85", "\\u001b[2J\\u0085"),
        ("\ud83d \ude00", "\\ud83d \\ude00"),
        ("ü" * 300, "ü" * 199),
    ],
)
def test_a_receiver_s_text(tmp_path: Path, said: str, heard: str) -> None:
    """As it was meant: escapes of JSON are undone, but those a terminal must not get, and those
    that are no character; a long text is cut between two characters."""
    path = str(tmp_path / "attach")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        refusing = Background(lambda: refuse(server, said))
        handle = Handle(path)
        try:
            with pytest.raises(AttachError) as caught:
                handle.open(10.0)
                handle.offer(10.0)
        finally:
            handle.stop()
            handle.close()
        refusing.result()
    assert str(caught.value) == f"the receiver refused: {heard}"


def refuse(server: socket.socket, text: str) -> None:
    client, _ = server.accept()
    with client:
        client.recv(4096)
        client.sendall(json.dumps({"error": {"desc": text}}).encode())
