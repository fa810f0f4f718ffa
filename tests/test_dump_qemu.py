"""`sharded-pc dump` of what real QEMUs write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sharded_pc.dump import Walk
from tests.qemu.backports import QemuBinary
from tests.qemu.vm import QemuVm

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]


def whole(path: Path) -> tuple[list[dict], Walk]:
    with path.open("rb", buffering=0) as file:
        walk = Walk(file)
        messages = list(walk.messages())
    assert walk.error is None, walk.error
    assert sum(message["size"] for message in messages) == walk.size == path.stat().st_size
    return messages, walk


def devices(messages: list[dict]) -> list[tuple[str, int]]:
    found = [m for m in messages if m.get("kind") == "full"]
    assert all(m["opaque"] > 0 or m["opaque"] == 0 for m in found)
    return [(m["name"], m["instance-id"]) for m in found]


def described(messages: list[dict]) -> list[tuple[str, int]]:
    return [(each["name"], each["instance-id"]) for each in messages[-1]["devices"]]


@pytest.fixture
def migrated(tmp_path: Path, binary: QemuBinary) -> Callable[..., Path]:
    """A QEMU that wrote its stream into a file."""

    def run(uri: str = "exec:cat > {}", **capabilities: bool) -> Path:
        path = tmp_path / "stream"
        with QemuVm(tmp_path, "src", binary=binary, memory_mib=32) as source:
            source.set_capabilities(**capabilities)
            source.migrate(uri.format(path))
            source.wait_migration("completed")
        return path

    return run


def test_precopy(migrated: Callable[..., Path]) -> None:
    messages, walk = whole(migrated())
    assert walk.kind == "migration" and walk.totals.machine.startswith("pc-i440fx-")
    blocks = walk.totals.blocks
    assert blocks["pc.ram"]["size"] == 32 << 20 and "pc.bios" in blocks
    assert blocks["pc.ram"]["normal"] + blocks["pc.ram"]["duplicate"] >= 8192
    assert messages[-1]["type"] == "vmdescription"
    assert devices(messages) == described(messages)


def test_x_ignore_shared_is_told(migrated: Callable[..., Path]) -> None:
    messages, _ = whole(migrated(x_ignore_shared=True))
    assert any(m.get("capabilities") == ["x-ignore-shared"] for m in messages)
    (setup,) = (m for m in messages if "blocks" in m)
    assert all("address" in block for block in setup["blocks"])


def test_mapped_ram(migrated: Callable[..., Path], binary: QemuBinary) -> None:
    if binary.version < (9, 0):
        pytest.skip("n/a: mapped-ram came with QEMU 9.0")
    messages, _ = whole(migrated("file:{}", mapped_ram=True))
    (setup,) = (m for m in messages if "blocks" in m)
    assert all(block["mapped-ram"]["page-size"] == 4096 for block in setup["blocks"])
    assert devices(messages) == described(messages)
