"""A real QEMU migrates to ``sharded-pc receive``: the RAM is the source's, byte for byte.

The sources run under TCG, throttled so that most pages are still there when postcopy begins. A
QEMU 7.2 source loses dirty pages of a guest that writes during precopy (facts of the project), so
its guest only reads once migration has begun; newer ones are tried with a writing guest too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

import sharded_pc
from tests.qemu import memory
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import MIB, write_image
from tests.qemu.vm import QemuVm
from tests.receiver import MARKED, Outcome, Receiver, Toucher

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90)]

MEMORY_MIB = 64


@contextmanager
def booted(
    folder: Path, binary: QemuBinary, *, writes: bool = False, **options
) -> Iterator[QemuVm]:
    """A source whose guest has filled its memory."""
    size = options.setdefault("memory_mib", MEMORY_MIB)
    image = write_image(folder / "guest.img", size, writes=writes)
    with QemuVm(folder, "src", binary=binary, image=image, **options) as source:
        source.wait_serial("F")
        yield source


def begin_precopy(source: QemuVm, uri: str, *, postcopy: bool = True, rate: int = 4 * MIB) -> None:
    """Migration at ``rate`` bytes/s; it does not end by itself unless ``rate`` is high."""
    source.set_capabilities(postcopy_ram=postcopy)
    source.set_parameters(max_bandwidth=rate, downtime_limit=1)
    source.migrate(uri)


def wait_ram(source: QemuVm, key: str, least: int) -> dict[str, Any]:
    """Waits until ``query-migrate``'s ``ram[key]`` is ``least`` or more; ``ram``."""

    def reached() -> dict[str, Any] | None:
        ram = source.query_migrate().get("ram", {})
        return ram if ram.get(key, 0) >= least else None

    return source.wait_until(reached, f"ram {key} >= {least}")


def switch(source: QemuVm, *, postcopy_rate: int = 0) -> None:
    """Postcopy from now on, after at least 1 MiB of precopy; 0 is no limit."""
    wait_ram(source, "transferred", MIB)
    source.set_parameters(max_postcopy_bandwidth=postcopy_rate)
    source.start_postcopy()


def check_equal(
    source: QemuVm, receiver: Receiver, outcome: Outcome, *, requests: bool = True
) -> None:
    """Both sides completed, and every block of the stopped source is in shared memory.

    ``requests`` is false where this receiver's requests were not sent to ``source``.
    """
    assert outcome.exit_code == 0, receiver.error(f"exit code {outcome.exit_code}")
    info, theirs = outcome.info, source.wait_migration("completed")
    assert info["status"] == "completed" and info["error-desc"] is None
    ram = receiver.ram()
    assert set(ram) == set(memory.blocks(source))
    assert memory.differences(source, ram) == {}
    check_figures(info, theirs)
    if requests:
        assert info["ram"]["postcopy-requests"] >= theirs["ram"]["postcopy-requests"]


def check_figures(info: dict[str, Any], theirs: dict[str, Any]) -> None:
    """What both sides count, they count alike."""
    ours, ram = info["ram"], theirs["ram"]
    assert ours["total"] == ram["total"] == sum(block["size"] for block in info["blocks"])
    assert (ours["remaining"], ours["page-size"]) == (0, ram["page-size"])
    assert (ours["normal"], ours["duplicate"]) == (ram["normal"], ram["duplicate"])
    for block in info["blocks"]:
        assert block["received-pages"] * block["page-size"] == block["size"]


def check_postcopy(info: dict[str, Any]) -> None:
    """Most pages came after the switch."""
    assert info["postcopy-state"] == "end"
    assert info["ram"]["discarded-pages"] * 4096 > info["ram"]["total"] // 2
    assert 0 <= info["downtime"] <= info["total-time"]


def check_touched(source: QemuVm, touched: dict[int, bytes], least: int) -> None:
    """What a guest read is what the source has."""
    theirs = memory.blocks(source)["pc.ram"].read()
    wrong = [n for n, page in touched.items() if theirs[n * 4096 : n * 4096 + 4096] != page]
    assert len(touched) >= least and wrong == []


class TestSwitchoverAck:
    """The source waits for the destination's word (QEMU 8.1 and newer)."""

    @pytest.mark.parametrize("postcopy", [True, False])
    def test_it_switches(self, tmp_path, unique_name, newer, postcopy):
        with (
            booted(tmp_path, newer) as source,
            Receiver(tmp_path, unique_name, None, "--switchover-ack") as receiver,
        ):
            source.set_capabilities(switchover_ack=True, return_path=True)
            rate = 4 * MIB if postcopy else 1024 * MIB
            begin_precopy(source, receiver.uri(), postcopy=postcopy, rate=rate)
            if postcopy:
                switch(source)
            else:
                source.set_parameters(downtime_limit=2000)
            check_equal(source, receiver, receiver.finish(), requests=False)


class TestPostcopy:
    @pytest.mark.parametrize(
        ("machine", "options"),
        [
            ("pc", {}),
            ("q35", {"smp": 2, "extra": ["-vga", "std"]}),
        ],
        ids=["pc", "q35-smp-vga"],
    )
    def test_ram_equals_the_stopped_source(self, tmp_path, unique_name, binary, machine, options):
        with (
            booted(tmp_path, binary, machine=machine, **options) as source,
            Receiver(tmp_path, unique_name) as receiver,
        ):
            begin_precopy(source, receiver.uri())
            switch(source)
            outcome = receiver.finish()
            check_equal(source, receiver, outcome)
            check_postcopy(outcome.info)

    def test_busy_guest(self, tmp_path, unique_name, newer):
        with booted(tmp_path, newer, writes=True, smp=2) as source:
            with Receiver(tmp_path, unique_name) as receiver:
                begin_precopy(source, receiver.uri())
                switch(source)
                check_equal(source, receiver, receiver.finish())
            assert source.wrong_words() == []

    def test_many_precopy_passes_over_the_same_pages(self, tmp_path, unique_name, newer):
        with (
            booted(tmp_path, newer, writes=True) as source,
            Receiver(tmp_path, unique_name) as receiver,
        ):
            begin_precopy(source, receiver.uri(), rate=256 * MIB)
            wait_ram(source, "dirty-sync-count", 5)
            switch(source)
            outcome = receiver.finish()
            check_equal(source, receiver, outcome)
            assert outcome.info["ram"]["normal"] > 3 * MEMORY_MIB * 256

    @pytest.mark.parametrize(
        "arguments",
        [
            ["-m", "65M"],
            ["-m", f"{66 * 1024 + 8}K"],  # QEMU rounds to 8 KiB
            ["-object", "memory-backend-ram,id=left,size=24M",
             "-object", "memory-backend-ram,id=right.1,size=40M",
             "-numa", "node,memdev=left", "-numa", "node,memdev=right.1", "-smp", "2"],
            ["-machine", "memory-backend=mem0", "-object", "memory-backend-memfd,id=mem0,size=64M"],
        ],
        ids=["65M", "66M+8K", "numa", "memfd"],
    )  # fmt: skip
    def test_shapes_of_memory(self, tmp_path, unique_name, newer, arguments):
        with (
            booted(tmp_path, newer, extra=arguments) as source,
            Receiver(tmp_path, unique_name, None, "--workers", "3") as receiver,
        ):
            begin_precopy(source, receiver.uri())
            switch(source)
            outcome = receiver.finish()
            check_equal(source, receiver, outcome)
            check_postcopy(outcome.info)

    def test_two_receivers_at_once(self, tmp_path, new_name, newer):
        with booted(tmp_path, newer) as source, Receiver(tmp_path, new_name()) as receiver:
            (tmp_path / "other").mkdir()
            with (
                booted(tmp_path / "other", newer) as other,
                Receiver(tmp_path / "other", new_name()) as second,
            ):
                pairs = [(source, receiver), (other, second)]
                for vm, target in pairs:
                    begin_precopy(vm, target.uri())
                for vm, _ in pairs:
                    switch(vm)
                for vm, target in pairs:
                    check_equal(vm, target, target.finish())


class TestGuest:
    """An attached guest in postcopy, most pages missing when it comes."""

    RATE = 2 * MIB

    def test_reads_what_the_source_has(self, tmp_path, unique_name, binary):
        with booted(tmp_path, binary) as source, Receiver(tmp_path, unique_name) as receiver:
            begin_precopy(source, receiver.uri())
            switch(source, postcopy_rate=self.RATE)
            with Toucher(receiver) as guest:
                at_first = guest.wait_ready()["ram"]
                assert at_first["remaining"] > 0.6 * at_first["total"]
                after = guest.wait_touched()
                assert after["ram"]["remaining"] > 0.3 * after["ram"]["total"]
                assert after["sharded"]["guests"] == 1
                source.set_parameters(max_postcopy_bandwidth=0)
                guest.go_on()
                touched = guest.finish()
            outcome = receiver.finish()
            check_equal(source, receiver, outcome)
            check_touched(source, touched, 200)
            assert source.query_migrate()["ram"]["postcopy-requests"] >= 10
        shards = outcome.info["sharded"]["shards"]
        assert sum(outcome.info["postcopy-latency-dist"]) >= 10
        assert sum(shard["faults"] for shard in shards) >= 10
        assert all(shard["pages"] for shard in shards)

    def test_what_it_writes_stays(self, tmp_path, unique_name, binary):
        with booted(tmp_path, binary) as source, Receiver(tmp_path, unique_name) as receiver:
            begin_precopy(source, receiver.uri())
            switch(source, postcopy_rate=self.RATE)
            with Toucher(receiver, writes=True, more=50) as guest:
                guest.wait_ready()
                guest.wait_touched()
                guest.go_on()
                guest_wrote = guest.wait_written()
                assert guest_wrote["ram"]["remaining"] > 0
                source.set_parameters(max_postcopy_bandwidth=0)
                touched = guest.finish()
            assert receiver.finish().exit_code == 0
            source.wait_migration("completed")
            check_touched(source, touched, 60)
            ram = receiver.ram()
            assert memory.differences(source, ram) == {"pc.ram": sorted(touched)}
            for page, before in touched.items():
                after = ram["pc.ram"][page * 4096 : page * 4096 + 4096]
                assert after == MARKED + before[len(MARKED) :]

    def test_attached_from_the_start(self, tmp_path, unique_name, binary):
        """The guest is there before the source is, and waits until it may run."""
        with booted(tmp_path, binary) as source, Receiver(tmp_path, unique_name) as receiver:
            with Toucher(receiver) as guest:
                begin_precopy(source, receiver.uri())
                switch(source, postcopy_rate=self.RATE)
                at_first = guest.wait_ready()
                assert at_first["postcopy-state"] in ("listening", "running")
                guest.wait_touched()
                source.set_parameters(max_postcopy_bandwidth=0)
                guest.go_on()
                touched = guest.finish()
            check_equal(source, receiver, receiver.finish())
            check_touched(source, touched, 200)

    def test_two_guests(self, tmp_path, unique_name, newer):
        with booted(tmp_path, newer) as source, Receiver(tmp_path, unique_name) as receiver:
            begin_precopy(source, receiver.uri())
            switch(source, postcopy_rate=self.RATE)
            with Toucher(receiver) as guest, Toucher(receiver, number=1) as other:
                for each in (guest, other):
                    each.wait_ready()
                    each.wait_touched()
                source.set_parameters(max_postcopy_bandwidth=0)
                for each in (guest, other):
                    each.go_on()
                touched = [each.finish() for each in (guest, other)]
            check_equal(source, receiver, receiver.finish())
            for pages in touched:
                check_touched(source, pages, 200)


class TestPrecopy:
    """The migration completes before anybody asks for postcopy."""

    @pytest.mark.parametrize(
        ("postcopy", "options"),
        [(False, {"smp": 2}), (True, {"machine": "q35", "extra": ["-vga", "std"]})],
        ids=["plain-pc-smp", "advised-q35-vga"],
    )
    def test_completes(self, tmp_path, unique_name, binary, postcopy, options):
        with (
            booted(tmp_path, binary, **options) as source,
            Receiver(tmp_path, unique_name) as receiver,
        ):
            begin_precopy(source, receiver.uri(), postcopy=postcopy, rate=1 << 30)
            outcome = receiver.finish()
            check_equal(source, receiver, outcome)
        assert outcome.info["postcopy-state"] == ("advise" if postcopy else "none")
        assert outcome.info["ram"]["postcopy-requests"] == 0

    def test_busy_guest(self, tmp_path, unique_name, newer):
        with (
            booted(tmp_path, newer, writes=True) as source,
            Receiver(tmp_path, unique_name) as receiver,
        ):
            begin_precopy(source, receiver.uri(), rate=64 * MIB)
            wait_ram(source, "dirty-sync-count", 3)
            source.set_parameters(max_bandwidth=0, downtime_limit=2000)
            check_equal(source, receiver, receiver.finish())

    def test_guest_may_attach_afterwards(self, tmp_path, unique_name, newer):
        with booted(tmp_path, newer) as source, Receiver(tmp_path, unique_name) as receiver:
            begin_precopy(source, receiver.uri(), rate=1 << 30)
            check_equal(source, receiver, receiver.finish())
            with sharded_pc.attach(unique_name) as guest:
                theirs = {name: block.read() for name, block in memory.blocks(source).items()}
                assert memory.differing_pages(guest.blocks["pc.ram"], theirs["pc.ram"]) == []
