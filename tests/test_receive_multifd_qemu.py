"""A real QEMU migrates with multifd: precopy alone, and as the part of a postcopy before its switch
where the source allows that (7.2; 10.1 does too, and 10.0 does not)."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from sharded_pc.native.multifd import can_unpack
from sharded_pc.wire.multifd import Flag
from tests.qemu import memory
from tests.qemu.backports import QemuBinary, distribution_qemu
from tests.qemu.guest_image import MIB
from tests.receiver import Outcome, Receiver
from tests.test_receive_qemu import booted, check_postcopy, wait_ram
from tests.test_run_qemu import check_goes_on, check_missing, check_plain, pair

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90)]

FAST = 1 << 30


def needs(compression: str) -> None:
    if compression != "none" and not can_unpack(Flag[compression.upper()]):
        pytest.skip(f"built without lib{compression}: install its development package")


def use_multifd(source, channels: int, compression: str = "none", **capabilities: bool) -> None:
    source.set_capabilities(multifd=True, **capabilities)
    source.set_parameters(multifd_channels=channels, multifd_compression=compression)


def migrated(source, receiver: Receiver, channels: int, compression: str = "none") -> Outcome:
    """Precopy at full speed, to its end."""
    use_multifd(source, channels, compression)
    source.set_parameters(max_bandwidth=FAST, downtime_limit=1000)
    source.migrate(receiver.uri())
    return receiver.finish()


def check_ram(source, receiver: Receiver, outcome: Outcome) -> None:
    """As check_equal, but for the pages sent: 7.2 counts some of multifd's not."""
    assert outcome.exit_code == 0, receiver.error(f"exit code {outcome.exit_code}")
    source.wait_migration("completed")
    ram = receiver.ram()
    assert set(ram) == set(memory.blocks(source))
    assert memory.differences(source, ram) == {}
    for block in outcome.info["blocks"]:
        assert block["received-pages"] * block["page-size"] == block["size"]


@pytest.mark.parametrize(
    ("channels", "compression"), [(2, "none"), (4, "none"), (2, "zlib"), (4, "zstd")]
)
def test_precopy(
    tmp_path: Path, unique_name: str, binary: QemuBinary, channels: int, compression: str
):
    needs(compression)
    with booted(tmp_path, binary) as source, Receiver(tmp_path, unique_name) as receiver:
        outcome = migrated(source, receiver, channels, compression)
        check_ram(source, receiver, outcome)
        assert outcome.info["postcopy-state"] == "none"


@pytest.mark.parametrize("placement", ["copy", "continue"])
def test_busy_guest(tmp_path: Path, unique_name: str, newer: QemuBinary, placement: str):
    """Several rounds: newer pages come behind older ones, and zeros behind data."""
    with (
        booted(tmp_path, newer, writes=True, smp=2) as source,
        Receiver(tmp_path, unique_name, None, "--placement", placement) as receiver,
    ):
        check_ram(source, receiver, migrated(source, receiver, 3))


def test_older_machine(tmp_path: Path, unique_name: str, newer: QemuBinary):
    """One that has its channels meet at each section's end, with zeros on the main channel."""
    with (
        booted(tmp_path, newer, machine="pc-i440fx-7.2", writes=True) as source,
        Receiver(tmp_path, unique_name) as receiver,
    ):
        check_ram(source, receiver, migrated(source, receiver, 2))


@pytest.fixture
def older() -> QemuBinary:
    """One that takes both capabilities together."""
    found = distribution_qemu()
    if found is None or found.version >= (8, 1):
        pytest.skip("n/a: the QEMU on PATH refuses postcopy with multifd (7.2 to 8.0 do not)")
    return found


@pytest.mark.parametrize("placement", ["copy", "continue"])
def test_postcopy(tmp_path: Path, unique_name: str, older: QemuBinary, placement: str):
    """Postcopy's own pages come on the main channel, as ever."""
    with (
        booted(tmp_path, older) as source,
        Receiver(tmp_path, unique_name, None, "--placement", placement) as receiver,
    ):
        use_multifd(source, 2, postcopy_ram=True)
        source.set_parameters(max_bandwidth=4 * MIB, downtime_limit=1)
        source.migrate(receiver.uri())
        wait_ram(source, "transferred", 8 * MIB)
        source.set_parameters(max_postcopy_bandwidth=0)
        source.start_postcopy()
        outcome = receiver.finish()
        check_ram(source, receiver, outcome)
        check_postcopy(outcome.info)


def test_run(tmp_path: Path, unique_name: str, newer: QemuBinary):
    """A guest goes on here, and finds what it had written until it was stopped."""
    with pair(tmp_path, unique_name, newer, smp=2) as vms:
        use_multifd(vms.source, 2)
        vms.precopy(postcopy=False, rate=16 * MIB)
        vms.source.set_parameters(max_bandwidth=FAST, downtime_limit=1000)
        info = vms.runner.wait_info()
        assert (info["status"], info["postcopy-state"]) == ("completed", "none")
        check_goes_on(vms)
        check_plain(vms)
        vms.end()


def test_run_in_postcopy(tmp_path: Path, unique_name: str, older: QemuBinary):
    with pair(tmp_path, unique_name, older) as vms:
        use_multifd(vms.source, 2, postcopy_ram=True)
        vms.resume()
        check_missing(vms.runner.look(), 0.5)
        info = vms.complete()
        assert (info["status"], info["postcopy-state"]) == ("completed", "end")
        vms.source.wait_migration("completed")
        check_goes_on(vms)
        check_plain(vms)
        vms.end()


def test_a_killed_source_is_a_lost_stream(tmp_path: Path, unique_name: str, binary: QemuBinary):
    with booted(tmp_path, binary) as source, Receiver(tmp_path, unique_name) as receiver:
        use_multifd(source, 2)
        source.set_parameters(max_bandwidth=4 * MIB, downtime_limit=1)
        source.migrate(receiver.uri())
        wait_ram(source, "transferred", 2 * MIB)
        source.kill()
        outcome = receiver.finish()
        assert outcome.exit_code == 4, receiver.stderr()
        assert "multifd" in receiver.stderr() or "the source closed" in receiver.stderr()
