"""What a machine type tells of its source (QEMU hw/core/machine.c, hw_compat_*)."""

from __future__ import annotations

import re

_VERSION = re.compile(r"-(\d+)\.(\d+)$")


def version(machine: str) -> tuple[int, int] | None:
    """(10, 0) of pc-q35-10.0; None of a machine type without one, such as microvm."""
    found = _VERSION.search(machine)
    return None if found is None else (int(found[1]), int(found[2]))


def awaits_switchover_ack(machine: str) -> bool:
    """Of a source whose capability switchover-ack is on: without it, it does not switch.

    From QEMU 11.1 on each device that wants to acknowledges for itself, and one too many fails the
    migration; machine types up to 11.0 stay with one for all (switchover-ack-legacy).
    """
    known = version(machine)
    return known is None or known < (11, 1)
