"""Workers die under a real guest: ``sharded-pc run`` loses ten of them in one migration."""

from __future__ import annotations

import os
import signal

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import wait_until
from tests.receiver import describe
from tests.test_receive_qemu import check_figures, switch
from tests.test_run_qemu import RATE, Pair, check_goes_on, check_missing, check_plain, pair

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90),
    pytest.mark.usefixtures("placement"),
]  # fmt: skip

WORKERS = 3
"""A shard that loses five within ten seconds is given up."""


def restarts(vms: Pair) -> list[int]:
    return [shard["restarts"] for shard in vms.runner.look()["sharded"]["shards"]]


def kill(vms: Pair, shard: int) -> None:
    """Returns when the successor serves."""
    count = sum(restarts(vms))
    os.kill(vms.runner.look()["sharded"]["shards"][shard]["pid"], signal.SIGKILL)
    wait_until(lambda: sum(restarts(vms)) > count, "a successor")


def check_end(vms: Pair, info: dict, deaths: list[int]) -> None:
    """The source is content, the guest finds its memory right, and nothing is left."""
    theirs = vms.source.wait_migration("completed")
    assert (info["status"], info["postcopy-state"]) == ("completed", "end")
    check_figures(info, theirs)
    assert [shard["restarts"] for shard in info["sharded"]["shards"]] == deaths
    check_goes_on(vms)
    check_plain(vms)
    vms.end()


def test_ten_kills(tmp_path, unique_name, binary):
    """Two in precopy, eight in postcopy."""
    options = ("--workers", str(WORKERS))
    with pair(tmp_path, unique_name, binary, options=options, smp=2) as vms:
        vms.precopy()
        for n in range(2):
            kill(vms, n)
        switch(vms.source, postcopy_rate=RATE)
        vms.guest.wait_event("RESUME")
        vms.wait_running()
        check_missing(vms.runner.look(), 0.7)
        for n in range(2, 10):
            kill(vms, n % WORKERS)
            check_missing(vms.runner.look(), 0.1)
        check_end(vms, vms.complete(), [4, 3, 3])


def test_all_at_once_while_qemu_loads_its_devices(tmp_path, unique_name, binary):
    """The switch waits for nobody that is dead."""
    with pair(tmp_path, unique_name, binary) as vms:
        vms.precopy()
        switch(vms.source, postcopy_rate=RATE)
        vms.source.wait_event("STOP")
        for shard in vms.runner.look()["sharded"]["shards"]:
            os.kill(shard["pid"], signal.SIGKILL)
        vms.guest.wait_event("RESUME")
        vms.wait_running()
        wait_until(lambda: restarts(vms) == [1, 1], f"successors: {describe([vms.runner.pid])}")
        check_end(vms, vms.complete(), [1, 1])
