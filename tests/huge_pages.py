"""One synthetic migration on a /dev/shm with huge pages, in a mount namespace of its own:

    unshare --mount python -m tests.huge_pages PLACEMENT HUGE [held]

prints the receiver's info as JSON.  The mount, with huge=HUGE, is this process's alone and goes
with it.  `held`: somebody has references to the huge pages while discards are punched.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sharded_pc.geometry import Placement, RamBlock
from sharded_pc.testing.oracle import PageOracle
from tests.guest_process import GuestProcess
from tests.qemu import wait_until
from tests.synthetic import WAIT_S, Background, Receiving, StepSource

BLOCKS = (RamBlock("pc.ram", 32 << 20),)


def hold(path: str) -> list[int]:
    """A pipe that refers to a page of each huge page of the file (vmsplice), as a device that reads
    or writes guest memory does; its ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for at in range(0, len(memory), 2 << 20):
            vector = (ctypes.c_char * 4096).from_buffer(memory, at)
            iov = (ctypes.c_size_t * 2)(ctypes.addressof(vector), 4096)
            assert libc.vmsplice(ends[1], ctypes.byref(iov), 1, 0) == 4096, os.strerror(
                ctypes.get_errno()
            )
            del vector
    return list(ends)


def main(placement: str, huge: str, held: str = "") -> None:
    mount = ["mount", "-t", "tmpfs", "-o", f"huge={huge},size=256M", "tmpfs", "/dev/shm"]
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
        receiver.wait_received(BLOCKS[0].pages)
        ends = hold(f"/dev/shm/{name}.pc.ram") if held else []
        source.switch()
        if held:  # what the punch left is asked for before any guest may run
            wait_until(lambda: source.back.requests, "requests", WAIT_S)
            assert guest.silent()
        sending = Background(source.end)
        guest.answer()
        assert guest.ask("visit_all") == []
        guest.ask("wait")
        sending.result()
        print(json.dumps(receiver.finish()))
        for end in ends:
            os.close(end)


if __name__ == "__main__":
    main(*sys.argv[1:])
