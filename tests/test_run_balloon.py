"""A guest balloons while its pages are missing: QEMU does not know that it is in postcopy, and
drops what the guest gives up; what the guest takes back and uses must stay."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import wait_until
from tests.qemu.backports import QemuBinary
from tests.qemu.balloon_guest import build
from tests.test_run_qemu import Pair, check_plain, pair

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90),
    pytest.mark.usefixtures("placement"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]  # fmt: skip

MEMORY_MIB = 512
"""Some seconds of a source at full speed."""


def test_ballooned_pages_are_used_again(tmp_path, unique_name, binary: QemuBinary):
    if binary.version < (10,):
        pytest.skip("n/a: a busy guest loses pages at a 7.2 source under TCG by itself")
    extra = ("-kernel", str(build(tmp_path)), "-device", "virtio-balloon-pci")
    with pair(tmp_path, unique_name, binary, image=None, extra=extra, memory_mib=MEMORY_MIB) as vms:
        vms.resume(rate=0)  # as fast as it goes: each page that the guest waits for comes at once
        holes = holes_while_missing(vms)
        assert vms.guest.serial().count(".") > 2, "it has hardly ballooned meanwhile"
        assert holes == sorted(holes, reverse=True), "something was dropped under the stream"
        info = vms.complete()
        assert info["status"] == "completed"
        unreserved = lambda: vms.runner.look()["sharded"]["unreserved"]  # noqa: E731
        wait_until(lambda: unreserved() > 0, "pages that are dropped indeed")
        vms.guest.wait_passes(20)
        assert vms.guest.wrong_words() == vms.source.wrong_words() == []
        check_plain(vms)
        vms.end()


def holes_while_missing(vms: Pair) -> list[int]:
    """Bytes of RAM without memory, again and again until all pages are here."""
    holes, last = [], None
    while (look := vms.runner.look())["ram"]["remaining"]:
        if last is not None:  # what was seen before is of a time when pages were missing
            holes.append(last)
        last = look["sharded"]["unreserved"]
    return holes
