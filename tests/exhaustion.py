"""A receiver in a mount namespace of its own whose /dev/shm others fill while pages are missing:

    unshare --mount python -m tests.exhaustion PLACEMENT

prints what it said when it was paused, and how the guest fared after room was made.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sharded_pc.geometry import Placement, RamBlock
from sharded_pc.native.alias import Alias
from sharded_pc.testing.oracle import PageOracle
from tests.control import Control
from tests.full_shm import fill_up
from tests.guest_process import GuestProcess
from tests.qemu import wait_until
from tests.synthetic import WAIT_S, Background, Receiving, StepSource, connect

PAGES = PageOracle((RamBlock("pc.ram", 16 << 20),), zero_share=0.9, dirty_share=0.8, seed=5)


def main(placement: str) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=32M", "tmpfs", "/dev/shm"]
    subprocess.run(mount, check=True)
    Alias.populate = lambda *_: (0, None)  # else nothing is left to be allocated with `continue`
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        name, path = f"full-{os.getpid()}", f"{folder}/control"
        receiving = Receiving(Path(folder), name, placement=Placement(placement), control=path)
        receiver = stack.enter_context(receiving)
        guest = stack.enter_context(GuestProcess(PAGES))
        control = stack.enter_context(contextlib.closing(Control(path)))
        exhaust(receiver, guest, control, folder)


def exhaust(receiver: Receiving, guest: GuestProcess, control: Control, folder: str) -> None:
    source = StepSource(receiver.sock, PAGES)
    source.begin()
    guest.ask("attach", receiver.attach)
    fill_up()
    sending = Background(source.postcopy)
    info = control.wait_status("postcopy-paused")
    print(json.dumps(info["error-desc"]))
    guest.say("visit_all")
    os.unlink("/dev/shm/others")
    with contextlib.suppress(Exception):
        sending.result()
    uri = f"unix:{folder}/again"
    assert control.execute("migrate-recover", uri=uri) == {}
    with contextlib.closing(connect(uri)) as sock:
        source.resume(sock)
        source.end()
        assert receiver.finish()["status"] == "completed"
    wait_until(lambda: not guest.silent(), "the guest", WAIT_S)
    print("wrong" if guest.answer() else "right")


if __name__ == "__main__":
    main(*sys.argv[1:])
