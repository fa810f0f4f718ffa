"""A guest whose /dev/shm is filled by others once it has arrived, in a mount namespace of its own:

    unshare --mount python -m tests.full_shm PLACEMENT [reserve]

prints the receiver's info as JSON, and after it how the guest fared that then touches all its RAM.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sharded_pc.geometry import Placement, RamBlock
from sharded_pc.testing.oracle import PageOracle
from tests.guest_process import GuestProcess
from tests.synthetic import Background, Receiving, StepSource

BLOCKS = (RamBlock("pc.ram", 16 << 20),)


def fill_up() -> None:
    with open("/dev/shm/others", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def main(placement: str, reserve: str = "") -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=32M", "tmpfs", "/dev/shm"]
    subprocess.run(mount, check=True)
    pages, name = PageOracle(BLOCKS, zero_share=0.9), f"full-{os.getpid()}"
    settings = {"placement": Placement(placement), "reserve": bool(reserve), "keep": True}
    with (
        tempfile.TemporaryDirectory() as folder,
        Receiving(Path(folder), name, **settings) as receiver,
        GuestProcess(pages) as guest,
    ):
        source = StepSource(receiver.sock, pages)
        guest.say("attach", receiver.attach)
        source.set_up()
        source.precopy()
        source.switch()
        guest.answer()
        sending = Background(source.end)
        guest.ask("wait")
        sending.result()
        print(json.dumps(receiver.finish()))
        fill_up()
        guest.say("visit_all")
        try:
            print("wrong" if guest.answer() else "right")
        except EOFError:
            guest.process.join()
            print("signal", -guest.process.exitcode)


if __name__ == "__main__":
    main(*sys.argv[1:])
