"""A guest that came through ``sharded-pc run`` is an ordinary one afterwards: it is migrated on,
saved and restored with all of its RAM, also while pages are still missing."""

from __future__ import annotations

import struct
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import wait_until
from tests.qemu.guest_image import MIB
from tests.qemu.vm import QemuVm
from tests.runner import Destination, Runner
from tests.test_receive_qemu import switch
from tests.test_run_qemu import MEMORY_MIB, Pair, check_goes_on, check_missing, pair

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90),
    pytest.mark.usefixtures("placement"),
]  # fmt: skip

OURS = ("x-ignore-shared", "events")


def capabilities(vm: QemuVm) -> dict[str, bool]:
    found = vm.qmp("query-migrate-capabilities")
    return {each["capability"]: each["state"] for each in found if each["capability"] in OURS}


@contextmanager
def plain(vms: Pair, folder: Path, incoming: str):
    """A QEMU without us that takes the guest; its command line is the destination's."""
    before = vms.guest
    with QemuVm(
        folder, "plain", binary=before.binary, memory_mib=MEMORY_MIB, image=folder / "guest.img",
        incoming=incoming,
    ) as vm:  # fmt: skip
        yield vm


def migrate_on(vms: Pair, uri: str) -> None:
    vms.guest.set_parameters(max_bandwidth=0, downtime_limit=2000)
    vms.guest.migrate(uri)
    vms.guest.wait_migration("completed")


def check_lives(vm: QemuVm) -> None:
    vm.wait_passes(2)
    assert vm.wrong_words() == []


def settled(vms: Pair) -> None:
    """All of its RAM is here."""
    vms.resume()
    vms.complete()
    check_goes_on(vms)


class TestAfterwards:
    def test_capabilities_are_as_before(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.precopy()
            ready = dict.fromkeys(OURS, True)
            wait_until(lambda: capabilities(vms.guest) == ready, "the wait for the stream")
            switch(vms.source)
            vms.guest.wait_event("RESUME")
            assert capabilities(vms.guest)["x-ignore-shared"] is False
            vms.complete()
            plain = dict.fromkeys(OURS, False)
            wait_until(lambda: capabilities(vms.guest) == plain, "all put back")
            vms.end()

    def test_to_a_plain_qemu(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            settled(vms)
            with plain(vms, tmp_path, f"unix:{tmp_path}/on") as vm:
                migrate_on(vms, f"unix:{tmp_path}/on")
                check_lives(vm)
            vms.end()

    def test_to_a_file_and_back(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            settled(vms)
            file = tmp_path / "state"
            migrate_on(vms, f"exec:cat > {file}")
            assert file.stat().st_size > 0.9 * MEMORY_MIB * MIB
            with plain(vms, tmp_path, f"exec:cat {file}") as vm:
                check_lives(vm)
            vms.end()

    def test_through_run_again(self, tmp_path, new_name, binary):
        with pair(tmp_path, new_name(), binary) as vms:
            settled(vms)
            both = {"memory_mib": MEMORY_MIB, "image": tmp_path / "guest.img"}
            guest = Destination(tmp_path, "dst2", binary=binary, **both)
            with Runner(tmp_path, new_name(), guest) as runner:
                again = Pair(vms.guest, runner, guest)
                again.resume()
                check_missing(runner.look())
                again.complete()
                check_goes_on(again)
                vms.end()  # the one before: its RAM goes, this guest's stays
                check_lives(guest)
                again.end()


class TestWhilePagesAreMissing:
    """Whatever reads all of the RAM waits for it, page by page."""

    def test_to_a_file_and_back(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.resume()
            file = tmp_path / "state"
            vms.guest.set_parameters(max_bandwidth=0, downtime_limit=2000)
            vms.guest.migrate(f"exec:cat > {file}")
            check_missing(vms.runner.look(), 0.5)
            vms.complete()
            vms.guest.wait_migration("completed")
            assert file.stat().st_size > 0.9 * MEMORY_MIB * MIB
            with plain(vms, tmp_path, f"exec:cat {file}") as vm:
                check_lives(vm)
            vms.end()

    def test_snapshot(self, tmp_path, unique_name, binary):
        """savevm holds QEMU's monitor until it has all; loadvm brings it back."""
        with pair(tmp_path, unique_name, binary, extra=("-snapshot",)) as vms:
            vms.resume(rate=24 * MIB)
            assert vms.guest.hmp("savevm here") == ""
            vms.complete()
            vms.guest.wait_passes(1)
            assert vms.guest.hmp("loadvm here") == ""
            check_lives(vms.guest)
            vms.end()

    def test_dump(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.resume(rate=24 * MIB)
            core = tmp_path / "core"
            vms.guest.qmp("dump-guest-memory", paging=False, protocol=f"file:{core}")
            vms.complete()
            passes = passes_in(core)
            assert max(passes) - min(passes) <= 1, passes
            check_lives(vms.guest)
            vms.end()


def passes_in(core: Path) -> set[int]:
    """What the guest's words say of its passes: each holds its own address, changed by the pass."""
    data = core.read_bytes()
    assert data[:4] == b"\x7fELF"
    (table,) = struct.unpack_from("<Q", data, 32)
    (count,) = struct.unpack_from("<H", data, 56)
    found: set[int] = set()
    for each in range(count):
        kind, _, offset, _, address, size = struct.unpack_from("<IIQQQQ", data, table + 56 * each)
        for page in range(max(address, MIB), address + size if kind == 1 else 0, 4096):
            if page < MEMORY_MIB * MIB:
                (word,) = struct.unpack_from("<I", data, offset + page - address)
                found.add(word ^ page)
    assert found, "no RAM in it"
    return found
