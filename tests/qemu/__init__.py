"""QEMU for the tests: our own guest, a process to run it in, and its memory to compare with.

``guest_image``  the guest: a boot sector that walks over its memory and reports on COM1
``vm``           one QEMU process, source or destination, driven over QMP
``kvm``          whether KVM runs the guest here
``memory``       the RAMBlocks of a stopped QEMU, byte for byte
``backports``    which QEMU binaries there are to test with, and how to get a newer one

Here is what they share: how a test waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

if __name__ == "qemu":  # tests/ on sys.path: this package would hide the client qemu.qmp
    raise ImportError("import this package as tests.qemu; is tests/__init__.py missing?")

TIMEOUT_S = 60.0
POLL_S = 0.01

T = TypeVar("T")


class VmError(AssertionError):
    """QEMU did not do what a test waited for."""


class WaitTimeout(VmError):
    """A condition did not come true in time."""


def wait_until(
    condition: Callable[[], T | None],
    what: str,
    timeout: float = TIMEOUT_S,
    poll: float = POLL_S,
) -> T:
    """Polls until ``condition()`` is true; its value. ``WaitTimeout`` after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise WaitTimeout(f"waited {timeout:g} s in vain for {what}")
        time.sleep(poll)
    return value
