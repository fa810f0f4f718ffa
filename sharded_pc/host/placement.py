"""Which placement this host and this guest are given, and why."""

from __future__ import annotations

from sharded_pc.errors import HostError
from sharded_pc.geometry import Placement
from sharded_pc.host.limits import Limits
from sharded_pc.host.memory import human, room
from sharded_pc.host.userfaultfd import Probe, minor_shmem

SPARE_BYTES = 64 << 20
"""`auto` populates RAM ahead only where this and a sixteenth of the RAM would stay free."""


def choose_placement(
    wanted: Placement | None,
    needed: int,
    limits: Limits | None = None,
    probe: Probe | None = None,
) -> tuple[Placement, str]:
    """The placement for `needed` bytes of RAM and the reason; `wanted` None: `auto`.
    HostError if the kernel cannot do what is wanted."""
    if wanted is Placement.COPY:
        return wanted, "as asked"
    limits = limits or Limits.read()
    kernel = minor_shmem(limits, probe or Probe.read())
    if wanted is Placement.CONTINUE:
        if not kernel.ok:
            raise HostError(f"--placement continue: {kernel}, or use --placement copy")
        return wanted, "as asked"
    if not kernel.ok:
        return Placement.COPY, f"the kernel lacks UFFD_FEATURE_{kernel.name}"
    spare = needed + needed // 16 + SPARE_BYTES
    for where, free, _ in room(limits, spare):
        if free < spare:
            return Placement.COPY, f"{human(free)} in {where}: too little to populate RAM ahead"
    return Placement.CONTINUE, f"the kernel has it and {human(needed)} of RAM can be populated"
