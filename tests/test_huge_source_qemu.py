"""A real QEMU whose guest's memory is hugetlbfs migrates here: QEMU's source checks our requests,
with postcopy-preempt it asserts them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu.guest_image import MIB
from tests.receiver import Receiver, Toucher
from tests.test_receive_qemu import (
    begin_precopy,
    booted,
    check_equal,
    check_postcopy,
    check_touched,
    switch,
)
from tests.test_recovery_qemu import Operator, check_end
from tests.test_run_qemu import RATE, check_missing, pair

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(120),
    pytest.mark.usefixtures("placement", "huge_pages"),
]  # fmt: skip

MEMORY_MIB = 64
HUGE_MIB = 2
BACKED = {
    "extra": [
        "-object", f"memory-backend-memfd,id=pc.ram,size={MEMORY_MIB}M,hugetlb=on,hugetlbsize=2M",
        "-machine", "memory-backend=pc.ram",
    ]
}  # fmt: skip
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
NUMBER = POOL / "nr_hugepages"


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Enough free ones for one guest at a time; afterwards as many are reserved as were before."""
    needed = MEMORY_MIB // HUGE_MIB
    if not NUMBER.exists():
        pytest.skip("n/a: this kernel has no huge pages of 2 MiB")
    with NUMBER.open() as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        before = int(NUMBER.read_text())
        try:
            if free() < needed:
                NUMBER.write_text(str(before + needed))
            if free() < needed:
                pytest.skip(f"n/a: too few huge pages: sysctl vm.nr_hugepages={needed}")
            yield
        except OSError:  # not root, or /sys is read-only
            pytest.skip(f"n/a: no huge pages: sysctl vm.nr_hugepages={needed}")
        finally:
            if int(NUMBER.read_text()) != before:
                NUMBER.write_text(str(before))


def free() -> int:
    return int((POOL / "free_hugepages").read_text())


class TestHugePages:
    def test_ram_equals_the_stopped_source(self, tmp_path, unique_name, binary):
        with (
            booted(tmp_path, binary, **BACKED) as source,
            Receiver(tmp_path, unique_name) as receiver,
        ):
            begin_precopy(source, receiver.uri())
            switch(source, postcopy_rate=32 * MIB)
            with Toucher(receiver, throttled=6) as guest:
                guest.wait_ready()
                guest.wait_touched()
                source.set_parameters(max_postcopy_bandwidth=0)
                guest.go_on()
                touched = guest.finish()
            outcome = receiver.finish()
            check_equal(source, receiver, outcome, requests=False)
            check_postcopy(outcome.info)
            check_touched(source, touched, 200)
        huge = MEMORY_MIB // HUGE_MIB
        assert 0 < outcome.info["ram"]["postcopy-requests"] <= 2 * huge

    def test_the_preempt_channel(self, tmp_path, unique_name, newer):
        """Its source asserts that it is asked for whole huge pages."""
        with (
            booted(tmp_path, newer, **BACKED) as source,
            Receiver(tmp_path, unique_name) as receiver,
        ):
            source.set_capabilities(postcopy_ram=True, postcopy_preempt=True)
            begin_precopy(source, receiver.uri())
            switch(source, postcopy_rate=8 * MIB)
            with Toucher(receiver, throttled=6) as guest:
                guest.wait_ready()
                guest.wait_touched()
                source.set_parameters(max_postcopy_bandwidth=0)
                guest.go_on()
                touched = guest.finish()
            check_equal(source, receiver, receiver.finish(), requests=False)
            check_touched(source, touched, 200)

    def test_a_guest_goes_on_and_recovers(self, tmp_path, unique_name, binary):
        path = tmp_path / "control"
        with pair(
            tmp_path, unique_name, binary, options=("--control", str(path)),
            differing={"extra": []}, **BACKED,
        ) as vms:  # fmt: skip
            vms.resume(RATE)
            check_missing(vms.runner.look())
            operator = Operator(vms, path)
            try:
                for by in ("source", "receiver"):
                    operator.cut(by)
                    operator.recover()
                check_end(operator)
            finally:
                operator.control.close()
