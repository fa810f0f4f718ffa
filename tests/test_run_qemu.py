"""A real QEMU resumes on the sharded RAM: ``sharded-pc run``, end to end.

Source and destination are the same QEMU under TCG, throttled so that nearly all RAM is still at
the source when the guest goes on. Our guest compares what it wrote before the migration with what
it finds after it. A QEMU 7.2 source loses dirty pages of a guest that writes during precopy (facts
of the project), so there the guest only reads once its memory is filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import wait_until
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import MIB, write_image
from tests.qemu.vm import QemuVm, QmpConnection
from tests.receiver import describe
from tests.runner import Destination, Runner
from tests.test_receive_qemu import begin_precopy, check_figures, switch

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90),
    pytest.mark.usefixtures("placement"),
]  # fmt: skip

MEMORY_MIB = 64
RATE = 4 * MIB
"""Bytes per second in postcopy until the guest has been looked at."""


@dataclass
class Pair:
    """A source whose guest has filled its memory, and the receiver it will migrate to."""

    source: QemuVm
    runner: Runner
    guest: Destination

    def precopy(self, **options: Any) -> None:
        """Begins the migration; the destination's QMP answers afterwards."""
        begin_precopy(self.source, self.runner.uri(), **options)
        self.guest.start()

    def resume(self, rate: int = RATE) -> float:
        """Migrates until the guest goes on here; milliseconds from STOP to RESUME."""
        self.precopy()
        switch(self.source, postcopy_rate=rate)
        stop, start = self.source.wait_event("STOP"), self.guest.wait_event("RESUME")
        self.wait_running()
        return 1000 * (seconds(start) - seconds(stop))

    def wait_running(self) -> None:
        """The receiver knows a little later than QEMU."""
        wait_until(lambda: self.runner.look()["postcopy-state"] == "running", "the switch")

    def wait_faults(self, many: int = 50) -> None:
        """The guest walks over its memory, and so meets every shard."""

        def all_met() -> bool:
            faults = [shard["faults"] for shard in self.runner.look()["sharded"]["shards"]]
            return all(faults) and sum(faults) >= many

        wait_until(all_met, f"{many} faults, and one in each shard")

    def complete(self) -> dict[str, Any]:
        """The rest of the pages at full speed; the receiver's JSON object."""
        self.source.set_parameters(max_postcopy_bandwidth=0)
        return self.runner.wait_info()

    def end(self) -> None:
        """The guest ends well, and so does the receiver."""
        self.guest.qmp("quit")
        assert self.runner.finish().exit_code == 0


def seconds(event: dict[str, Any]) -> float:
    return event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6


@contextmanager
def pair(
    folder: Path, name: str, binary: QemuBinary, *, writes: bool | None = None,
    options: tuple[str, ...] = (), differing: dict[str, Any] | None = None,
    front: tuple[str, ...] = (), incoming: str | None = None, **both: Any,
) -> Iterator[Pair]:  # fmt: skip
    """``both`` goes to source and destination, ``differing`` to the destination instead;
    ``front`` is what the destination's command line begins with."""
    both.setdefault("memory_mib", MEMORY_MIB)
    writes = binary.version >= (10,) if writes is None else writes
    image = folder / "guest.img"
    if not image.exists():
        write_image(image, both["memory_mib"], writes=writes)
    both.setdefault("image", image)
    guest = Destination(folder, "dst", binary=binary, **{**both, **(differing or {})})
    guest.front = front
    with QemuVm(folder, "src", binary=binary, **both) as source:
        source.wait_serial("F")
        control = "--control" not in options
        with Runner(folder, name, guest, *options, control=control, incoming=incoming) as runner:
            yield Pair(source, runner, guest)


def check_missing(info: dict[str, Any], least: float = 0.8) -> None:
    assert info["postcopy-state"] in ("listening", "running")  # QEMU says RESUME before we know
    ram = [block for block in info["blocks"] if block["size"] > 16 * MIB]  # not ROMs, not VGA's
    total = sum(block["size"] for block in ram)
    assert total - sum(block["received-pages"] * 4096 for block in ram) > least * total


def check_goes_on(vms: Pair, passes: int = 2) -> None:
    """The guest still walks over its memory, and all of it is right."""
    vms.guest.wait_passes(passes)
    assert vms.guest.wrong_words() == vms.source.wrong_words() == []


def check_info(vms: Pair, info: dict[str, Any]) -> None:
    """The figures are those of the source and of the guest's real faults."""
    theirs = vms.source.wait_migration("completed")
    assert (info["status"], info["postcopy-state"]) == ("completed", "end")
    check_figures(info, theirs)
    # A few requests, for private blocks, are sent beside those that are counted.
    ours, counted = info["ram"]["postcopy-requests"], theirs["ram"]["postcopy-requests"]
    assert 0 < ours <= counted + 8 and counted <= ours + 8
    shards = info["sharded"]["shards"]
    assert all(shard["faults"] for shard in shards)
    lost = sum(shard["lost-samples"] for shard in shards)
    assert sum(info["postcopy-latency-dist"]) + lost == sum(shard["faults"] for shard in shards)


def check_plain(vms: Pair) -> None:
    """Nothing of the migration is left but the shared memory and QEMU's parent."""
    assert vms.guest.userfaultfds() == []
    assert vms.guest.registered_bytes() == 0
    wait_until(lambda: only_guest(vms), "the workers' end")
    wait_until(lambda: not vms.runner.attach_path.exists(), "the attach socket's end")
    assert any(name.startswith(f"{vms.runner.name}.") for name in vms.runner.segments())


def only_guest(vms: Pair) -> bool:
    others = set(vms.runner.processes()) - {vms.runner.pid, vms.guest.pid}
    known = ("resource_tracker", *vms.guest.front[-1:])
    return all(any(word in line for word in known) for line in describe(sorted(others)))


def check_whole(vms: Pair, ram_bytes: int = MEMORY_MIB * MIB) -> dict[str, Any]:
    """Resumes with nearly all RAM missing, completes, checks all, ends; the JSON object."""
    took = vms.resume()
    check_missing(vms.runner.look())
    assert vms.guest.registered_bytes() == ram_bytes
    vms.wait_faults()
    info = vms.complete()
    assert abs(took - info["downtime"]) < 200
    check_info(vms, info)
    check_goes_on(vms)
    check_plain(vms)
    vms.end()
    return info


NET = ("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile=")
DEVICES = (
    "-vga", "std", "-device", "virtio-rng-pci", *NET, "-device", "virtio-balloon-pci",
)  # fmt: skip
NUMA = (
    "-object", "memory-backend-ram,id=left,size=24M",
    "-object", "memory-backend-memfd,id=right.1,size=40M,share=on",
    "-numa", "node,memdev=left", "-numa", "node,memdev=right.1",
)  # fmt: skip
"""Sizes at which a QEMU 10.0.2 source aborts if its guest writes (tlb_reset_dirty_range_all)."""
NAMED_BY_PATH = (
    "-machine", "memory-backend=mem0", "-object",
    '{"qom-type":"memory-backend-memfd","id":"mem0","size":67108864,'
    '"host-nodes":[0],"policy":"bind","merge":false,"reserve":false}',
)  # fmt: skip
"""With a machine type before 4.0 the block is /objects/mem0."""
DIMM = (
    "-m", "slots=2,maxmem=1G", "-object", "memory-backend-memfd,id=dimm0,size=32M",
    "-device", '{"driver":"pc-dimm","memdev":"dimm0"}',
)  # fmt: skip
BACKEND = ("-machine", "memory-backend=mem0", "-object", "memory-backend-ram,id=mem0,size=64M")


class TestResume:
    """Of each QEMU there is, with at least 80 % of the RAM missing when the guest goes on."""

    @pytest.mark.parametrize(("machine", "size"), [("pc", 256), ("q35", 64)])
    def test_machine(self, tmp_path, unique_name, binary, machine, size):
        with pair(tmp_path, unique_name, binary, machine=machine, memory_mib=size) as vms:
            check_whole(vms, size * MIB)

    @pytest.mark.parametrize(
        ("machine", "extra"),
        [
            ("pc", DEVICES), ("q35", DEVICES), ("pc", BACKEND), ("q35", NUMA),
            ("pc-i440fx-3.1", NAMED_BY_PATH),
        ],
        ids=["pc-devices", "q35-devices", "memory-backend", "numa", "named-by-path"],
    )  # fmt: skip
    def test_command_line(self, tmp_path, unique_name, binary, machine, extra):
        both = {"machine": machine, "extra": extra, "smp": 2}
        writes = False if extra == NUMA else None
        with pair(tmp_path, unique_name, binary, writes=writes, **both) as vms:
            check_whole(vms)

    def test_named_backend_of_a_plain_source(self, tmp_path, unique_name, binary):
        """The destination calls its RAM otherwise than the source does."""
        with pair(tmp_path, unique_name, binary, differing={"extra": BACKEND}) as vms:
            info = check_whole(vms)
        assert info["blocks"][0]["name"] == "pc.ram"

    def test_dimm(self, tmp_path, unique_name, binary):
        """Its memory arrives on demand like the machine's."""
        with pair(tmp_path, unique_name, binary, writes=False, extra=DIMM) as vms:
            info = check_whole(vms, 96 * MIB)
        assert {block["name"]: block["size"] for block in info["blocks"]}["dimm0"] == 32 * MIB

    @pytest.mark.parametrize(
        "front", [("nice", "-n", "1"), ("env", "A=b", "sh", "-c", '"$0" "$@"; exit $?')],
        ids=["nice", "shell"],
    )  # fmt: skip
    def test_wrapper(self, tmp_path, unique_name, binary, front):
        """As /usr/bin/kvm, or numactl; a shell may live on beside QEMU."""
        with pair(tmp_path, unique_name, binary, front=front) as vms:
            check_whole(vms)

    def test_more_workers_than_processors(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary, options=("--workers", "4"), smp=2) as vms:
            assert len(check_whole(vms)["sharded"]["shards"]) == 4

    def test_paused_until_cont(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary, differing={"extra": ("-S",)}) as vms:
            vms.precopy()
            switch(vms.source, postcopy_rate=RATE)
            vms.wait_running()
            assert vms.guest.run_state() == "paused"
            check_missing(vms.runner.look())
            vms.guest.qmp("cont")
            vms.guest.wait_event("RESUME")
            vms.complete()
            check_goes_on(vms)
            check_plain(vms)
            vms.end()

    def test_control_socket(self, tmp_path, unique_name, binary):
        with pair(
            tmp_path, unique_name, binary, options=("--control", f"{tmp_path}/control")
        ) as vms:
            vms.resume()
            control = QmpConnection(tmp_path / "control")
            try:
                check_missing(control.execute("query-migrate", {}))
                vms.complete()
                assert control.execute("query-migrate", {})["status"] == "completed"
            finally:
                control.close()
            check_goes_on(vms)
            vms.end()

    def test_two_at_once(self, tmp_path, new_name, binary):
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            folder.mkdir()
        with (
            pair(folders[0], new_name(), binary) as one,
            pair(folders[1], new_name(), binary) as two,
        ):
            for vms in (one, two):
                vms.precopy()
            for vms in (one, two):
                switch(vms.source, postcopy_rate=RATE)
            for vms in (one, two):
                vms.guest.wait_event("RESUME")
                check_missing(vms.runner.look(), 0.7)
            for vms in (one, two):
                check_info(vms, vms.complete())
                check_goes_on(vms)
                check_plain(vms)
                vms.end()


class TestDisk:
    def test_virtio_blk(self, tmp_path, unique_name, binary):
        """The guest booted from one; of the other, locked by whoever runs, all is still there."""
        image = write_image(tmp_path / "guest.img", MEMORY_MIB, writes=binary.version >= (10,))
        data = tmp_path / "data.img"
        data.write_bytes(b"\x5a" * MIB)
        extra = (
            "-drive", f"if=none,id=boot,file={image},format=raw,file.locking=off",
            "-device", "virtio-blk-pci,drive=boot,bootindex=0",
            "-drive", f"if=none,id=data,file={data},format=raw",
            "-device", "virtio-blk-pci,drive=data",
        )  # fmt: skip
        with pair(tmp_path, unique_name, binary, image=None, extra=extra) as vms:
            vms.source.hmp('qemu-io data "write -P 0xa5 0 64k"')
            vms.resume()
            check_missing(vms.runner.look())
            assert {each["device"] for each in vms.guest.qmp("query-block")} >= {"boot", "data"}
            for command in ("read -P 0xa5 0 64k", "read -P 0x5a 64k 64k", "write -P 0x11 0 4k"):
                vms.guest.hmp(f'qemu-io data "{command}"')
            check_info(vms, vms.complete())
            check_goes_on(vms)
            vms.end()
            said = vms.runner.finish().stderr  # QEMU's stdout comes here, when it ends
            assert said.count("1 ops;") == 3 and "verification failed" not in said
        assert data.read_bytes()[:8192] == b"\x11" * 4096 + b"\xa5" * 4096


class TestPrecopy:
    """It completes before anybody asks for postcopy."""

    @pytest.mark.parametrize(
        ("machine", "postcopy"), [("pc", False), ("q35", True)], ids=["plain-pc", "advised-q35"]
    )
    def test_completes(self, tmp_path, unique_name, binary, postcopy, machine):
        extra = ("-vga", "std")
        with pair(tmp_path, unique_name, binary, machine=machine, extra=extra, writes=False) as vms:
            vms.precopy(postcopy=postcopy, rate=16 * MIB)
            vms.source.set_parameters(max_bandwidth=0, downtime_limit=1000)
            stop, start = vms.source.wait_event("STOP"), vms.guest.wait_event("RESUME")
            info, theirs = vms.runner.wait_info(), vms.source.wait_migration("completed")
            assert info["status"] == "completed"
            assert info["postcopy-state"] == ("advise" if postcopy else "none")
            check_figures(info, theirs)
            took = 1000 * (seconds(start) - seconds(stop))
            assert info["downtime"] - 200 < took < 2000
            check_goes_on(vms)
            check_plain(vms)
            vms.end()
