"""``sharded-pc run`` with KVM: faults come from VCPU threads inside the kernel.

Where KVM is nested the guest is so slow that a sequential one is overtaken by the stream after its
first faults; so it jumps about. A source under KVM loses no dirty page (7.2 does under TCG): it
writes throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import wait_until
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import MIB, write_image
from tests.qemu.kvm import kvm_problem
from tests.test_receive_qemu import check_figures, switch
from tests.test_run_qemu import (
    RATE,
    Pair,
    check_goes_on,
    check_info,
    check_missing,
    check_plain,
    pair,
)

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90)]

MEMORY_MIB = 32


@pytest.fixture
def kvm(binary: QemuBinary) -> QemuBinary:
    """Every QEMU whose KVM runs our guest."""
    if problem := kvm_problem(binary):
        pytest.skip(f"n/a: {problem}")
    return binary


@contextmanager
def kvm_pair(folder: Path, name: str, binary: QemuBinary, **more: Any) -> Iterator[Pair]:
    image = write_image(folder / "guest.img", MEMORY_MIB, scattered=True)
    with pair(folder, name, binary, accel="kvm", image=image, memory_mib=MEMORY_MIB, **more) as vms:
        yield vms


def check_is_kvm(vms: Pair) -> None:
    for vm in (vms.source, vms.guest):
        assert vm.qmp("query-kvm") == {"enabled": True, "present": True}


def wait_faults(vms: Pair) -> None:
    """Until each shard has had one; at the low rate nearly all pages are still missing."""

    def everywhere() -> bool:
        return all(shard["faults"] for shard in vms.runner.look()["sharded"]["shards"])

    wait_until(everywhere, "a fault of each shard")


@pytest.mark.usefixtures("placement")
def test_resume(tmp_path, unique_name, kvm):
    with kvm_pair(tmp_path, unique_name, kvm, machine="q35", smp=2) as vms:
        took = vms.resume()
        check_missing(vms.runner.look())
        check_is_kvm(vms)
        assert vms.guest.registered_bytes() == MEMORY_MIB * MIB
        wait_faults(vms)
        info = vms.complete()
        assert abs(took - info["downtime"]) < 500
        check_info(vms, info)
        check_goes_on(vms)
        check_plain(vms)
        vms.end()


def test_paused_until_cont(tmp_path, unique_name, kvm):
    with kvm_pair(tmp_path, unique_name, kvm, differing={"extra": ("-S",)}) as vms:
        vms.precopy()
        switch(vms.source, postcopy_rate=RATE)
        vms.wait_running()
        assert vms.guest.run_state() == "paused"
        check_missing(vms.runner.look())
        vms.guest.qmp("cont")
        vms.guest.wait_event("RESUME")
        wait_faults(vms)
        vms.complete()
        check_goes_on(vms)
        check_plain(vms)
        vms.end()


def test_precopy_completes(tmp_path, unique_name, kvm):
    with kvm_pair(tmp_path, unique_name, kvm) as vms:
        vms.precopy(postcopy=True, rate=16 * MIB)
        vms.source.set_parameters(max_bandwidth=0, downtime_limit=2000)
        vms.guest.wait_event("RESUME")
        info, theirs = vms.runner.wait_info(), vms.source.wait_migration("completed")
        assert (info["status"], info["postcopy-state"]) == ("completed", "advise")
        check_figures(info, theirs)
        check_goes_on(vms)
        check_plain(vms)
        vms.end()


def test_unusable_kvm_is_described(tmp_path):
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho 'qemu: Could not access KVM kernel module' >&2\nexit 1\n")
    program.chmod(0o755)
    problem = kvm_problem(QemuBinary(program, (9, 9, 9)))
    assert problem.startswith("/dev/kvm does not run our guest: qemu-9.9.9 with -accel kvm: ''")
    assert problem.endswith("; qemu: Could not access KVM kernel module")
