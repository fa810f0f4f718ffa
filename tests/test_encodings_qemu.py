"""A real QEMU that sends encoded pages: the RAM is the source's, byte for byte."""

from __future__ import annotations

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import memory
from tests.qemu.guest_image import MIB
from tests.qemu.vm import QemuVm
from tests.receiver import Receiver
from tests.test_receive_qemu import (
    MEMORY_MIB,
    begin_precopy,
    booted,
    check_equal,
    switch,
    wait_ram,
)

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(120),
    pytest.mark.usefixtures("placement"),
]  # fmt: skip


def xbzrle_pages(source: QemuVm) -> int:
    return source.query_migrate().get("xbzrle-cache", {}).get("pages", 0)


class TestXbzrle:
    """Only newer sources: 7.2 loses pages of a guest that writes during precopy, under TCG."""

    @pytest.mark.parametrize("postcopy", [True, False], ids=["postcopy", "precopy"])
    def test_a_guest_that_rewrites_its_pages(self, tmp_path, unique_name, newer, postcopy):
        with (
            booted(tmp_path, newer, writes=True) as source,
            Receiver(tmp_path, unique_name) as receiver,
        ):
            source.set_capabilities(xbzrle=True)
            source.set_parameters(xbzrle_cache_size=MEMORY_MIB * MIB)
            begin_precopy(source, receiver.uri(), postcopy=postcopy, rate=64 * MIB)
            source.wait_until(lambda: xbzrle_pages(source) > 500, "xbzrle pages")
            if postcopy:
                switch(source)
            else:
                source.set_parameters(downtime_limit=20000, max_bandwidth=0)
            outcome = receiver.finish()
            check_equal(source, receiver, outcome, requests=False)
            if postcopy:
                assert outcome.info["postcopy-state"] == "end"
            assert source.wrong_words() == []


class TestCompress:
    """QEMU has it until 9.0; the guest is stopped, for 7.2 loses pages of one that writes."""

    @pytest.mark.parametrize("postcopy", [True, False], ids=["postcopy", "precopy"])
    def test_ram_equals_the_stopped_source(self, tmp_path, unique_name, binary, postcopy):
        if binary.version >= (9, 1):
            pytest.skip("n/a: QEMU 9.1 has no capability compress any more")
        with booted(tmp_path, binary) as source, Receiver(tmp_path, unique_name) as receiver:
            source.qmp("stop")
            source.set_capabilities(compress=True)
            begin_precopy(source, receiver.uri(), postcopy=postcopy, rate=4 * MIB)
            if postcopy:
                switch(source)
            else:
                wait_ram(source, "transferred", MIB)
                source.set_parameters(max_bandwidth=0)
            outcome, theirs = receiver.finish(), source.wait_migration("completed")
            assert outcome.exit_code == 0, receiver.error(f"exit code {outcome.exit_code}")
            assert memory.differences(source, receiver.ram()) == {}
        packed = theirs["compression"]["pages"]  # some of them were zeros
        assert theirs["ram"]["normal"] < 500 < outcome.info["ram"]["normal"] <= packed + 500
        assert (outcome.info["postcopy-state"] == "end") == postcopy
