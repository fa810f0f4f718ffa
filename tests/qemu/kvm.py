"""Whether KVM runs our guest here, found out by running it.

The device node says little: it may be there and closed to us, busy, or nested so that a guest
takes minutes over what others do in a second.
"""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path

from tests.qemu import VmError
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import write_image
from tests.qemu.vm import QemuVm

PROBE_MIB = 4
PROBE_PASSES = 3
PROBE_S = 15.0
"""Nested on a loaded machine of two processors, it took 2 to 4 s."""


@cache
def kvm_problem(binary: QemuBinary) -> str | None:
    """Why tests with KVM are not run with ``binary``, or None; asked once by each test process."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvm-") as folder:
        image = write_image(Path(folder) / "guest.img", PROBE_MIB)
        vm = QemuVm(Path(folder), binary=binary, accel="kvm", memory_mib=PROBE_MIB, image=image)
        try:
            with vm:
                vm.wait_serial(".", PROBE_S, PROBE_PASSES)
        except VmError:
            return _describe(vm, time.monotonic() - began)
    return None


def _describe(vm: QemuVm, seconds: float) -> str:
    said = [line for line in vm.stderr().splitlines() if line.strip()]
    heard = f"{vm.serial()[:20]!r} on its serial line"
    after = f"{vm.binary} with -accel kvm: {heard} after {seconds:.0f} s"
    return f"/dev/kvm does not run our guest: {after}{'; ' + said[0] if said else ''}"
