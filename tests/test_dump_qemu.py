"""`sharded-pc dump` of what real QEMUs write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sharded_pc.dump import Walk
from tests.qemu.backports import QemuBinary
from tests.qemu.vm import QemuVm
from tests.receiver import Receiver
from tests.test_preempt_qemu import preempt_pages
from tests.test_receive_multifd_qemu import migrated as migrated_by_multifd
from tests.test_receive_multifd_qemu import needs
from tests.test_receive_qemu import Toucher, begin_precopy, booted, switch

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


def pages(walk: Walk) -> int:
    ram = walk.totals.ram()
    return ram["normal"] + ram["duplicate"]


@pytest.mark.uffd
def test_recorded_channels_of_multifd(tmp_path: Path, unique_name: str, newer: QemuBinary) -> None:
    needs("zstd")
    file = tmp_path / "recording"
    with (
        booted(tmp_path, newer, memory_mib=16) as source,
        Receiver(tmp_path, unique_name, None, "--record", str(file)) as receiver,
    ):
        outcome = migrated_by_multifd(source, receiver, 2, "zstd")
    assert outcome.exit_code == 0
    main, first, second = (whole(file.with_name(file.name + end))[1]
                           for end in ("", ".multifd-0", ".multifd-1"))  # fmt: skip
    assert [walk.kind for walk in (main, first, second)] == ["migration", "multifd", "multifd"]
    assert pages(main) == 0 and pages(first) > 500 and pages(second) > 500
    assert pages(first) + pages(second) >= outcome.info["ram"]["total"] // 4096


@pytest.mark.uffd
def test_recorded_channel_of_preempt(tmp_path: Path, unique_name: str, newer: QemuBinary) -> None:
    file = tmp_path / "recording"
    with (
        booted(tmp_path, newer, memory_mib=16) as source,
        Receiver(tmp_path, unique_name, None, "--record", str(file)) as receiver,
    ):
        source.set_capabilities(postcopy_ram=True, postcopy_preempt=True)
        begin_precopy(source, receiver.uri())
        switch(source, postcopy_rate=2 << 20)
        with Toucher(receiver) as guest:
            guest.wait_ready()
            guest.wait_touched()
            source.set_parameters(max_postcopy_bandwidth=0)
            guest.go_on()
            guest.finish()
        outcome = receiver.finish()
    assert outcome.exit_code == 0
    _, main = whole(file)
    _, asked_for = whole(file.with_name("recording.preempt"))
    assert (main.kind, asked_for.kind) == ("migration", "postcopy-preempt")
    assert pages(asked_for) == preempt_pages(outcome.info) > 0
