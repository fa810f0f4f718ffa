"""One synthetic migration on a /dev/shm with huge pages, in a mount namespace of its own:

    unshare --mount python -m tests.huge_pages PLACEMENT

prints the receiver's info as JSON.  The mount is this process's alone and goes with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sharded_pc.geometry import Placement, RamBlock
from sharded_pc.testing.oracle import PageOracle
from tests.qemu import wait_until
from tests.synthetic import WAIT_S, Background, GuestProcess, Receiving, StepSource

BLOCKS = (RamBlock("pc.ram", 32 << 20),)


def main(placement: str) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "huge=advise,size=256M", "tmpfs", "/dev/shm"]
    subprocess.run(mount, check=True)
    pages, name = PageOracle(BLOCKS), f"huge-{os.getpid()}"
    with (
        tempfile.TemporaryDirectory() as folder,
        Receiving(
            Path(folder), name, placement=Placement(placement), stripe_bytes=None
        ) as receiver,
        GuestProcess(pages) as guest,
    ):
        source = StepSource(receiver.sock, pages)
        guest.say("attach", receiver.attach)
        source.set_up()
        control = receiver.coordinator.memory.control
        wait_until(lambda: control.view.n_guests == 1, "the guest", WAIT_S)
        source.precopy()
        source.switch()
        guest.answer()
        sending = Background(source.end)
        guest.ask("visit_all")
        guest.ask("wait")
        sending.result()
        print(json.dumps(receiver.finish()))


if __name__ == "__main__":
    main(*sys.argv[1:])
