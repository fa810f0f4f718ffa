"""A real guest goes on while its disk is another process's: `qemu-storage-daemon` as vhost-user-blk
reads and writes RAM of which pages are missing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.mapper import GUEST
from tests.preload_kit import MIB, WAIT_S
from tests.qemu import wait_until
from tests.qemu.backports import QemuBinary
from tests.qemu.balloon_guest import build
from tests.runner import Runner
from tests.test_run_qemu import check_missing, check_plain, pair
from tests.test_vhost_user import STORAGE_DAEMON, back_end

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(STORAGE_DAEMON is None, reason="no qemu-storage-daemon: install qemu-utils"),
]  # fmt: skip

MEMORY_MIB = 64
SHARED = (
    "-machine", "memory-backend=mem", "-object",
    f"memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on",
)  # fmt: skip


def device(where: Path) -> tuple[str, ...]:
    return (
        *SHARED, "-chardev", f"socket,id=disk,path={where}",
        "-device", "vhost-user-blk-pci-non-transitional,chardev=disk,num-queues=1",
    )  # fmt: skip


@contextlib.contextmanager
def storage(disk: Path, where: Path, *front: str) -> Iterator[None]:
    """A vhost-user-blk back-end of the disk, which others may have too."""
    node = f"driver=file,node-name=disk,filename={disk},locking=off"
    export = f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={where},writable=on"
    command = [*front, STORAGE_DAEMON, "--blockdev", node, "--export", export]
    with back_end(command):
        wait_until(where.exists, "the back-end", WAIT_S)
        yield


@pytest.mark.usefixtures("placement")
def test_a_disk_of_another_process(tmp_path, unique_name, newer: QemuBinary):
    disk, there, here = (tmp_path / name for name in ("disk", "src.blk", "dst.blk"))
    disk.write_bytes(bytes(MIB))
    kernel = ("-kernel", str(build(tmp_path, "blk_guest")))
    front = (*GUEST, "--name", unique_name, "--attach", str(tmp_path / f"{unique_name}.attach"))
    both = {"image": None, "memory_mib": MEMORY_MIB, "extra": (*kernel, *device(there))}
    differing = {"extra": (*kernel, *device(here))}
    with (
        storage(disk, there),
        storage(disk, here, *front, "--"),
        pair(tmp_path, unique_name, newer, differing=differing, **both) as vms,
    ):
        vms.resume(rate=MIB)
        wait_until(lambda: vms.runner.look()["sharded"]["guests"] == 2, "the back-end", WAIT_S)
        vms.guest.hmp("sendkey a")
        vms.guest.wait_serial("K")
        vms.guest.wait_serial("B")
        check_missing(vms.runner.look(), 0.05)
        info = vms.complete()
        assert info["status"] == "completed"
        vms.guest.wait_serial("B", count=vms.guest.serial().count("B") + 4)
        assert vms.guest.wrong_words() == vms.source.wrong_words() == []
        assert "!" not in vms.guest.serial()
        check_plain(vms)
        vms.end()


def test_a_back_end_that_is_no_guest(tmp_path, unique_name, newer):
    """It is refused before a source connects; so is one that nobody serves."""
    disk, where = tmp_path / "disk", tmp_path / "blk"
    disk.write_bytes(bytes(MIB))
    command = [*newer.command(), "-m", f"{MEMORY_MIB}", *device(where)]
    for server, says in (
        (contextlib.nullcontext(), f"nobody listens at {where}; start it by `sharded-pc guest"),
        (storage(disk, where), f"at {where}) would map the RAM without a userfaultfd"),
    ):
        with server:
            runner = Runner(tmp_path, unique_name, command)
            try:
                outcome = runner.run_to_end()
            finally:
                runner.close()
        assert outcome.exit_code == 2 and says in outcome.stderr
