"""What this host can do: every need of ours as a finding, each missing one with its remedy.

`sharded-pc check` prints the findings, `require_host` raises them in the same words, and
`require_memory` answers when the guest's size is known.  `Limits` and `Probe` read the host;
the functions that judge them are pure, so that any host can be described to them.
"""

from __future__ import annotations

import dataclasses

from sharded_pc.errors import HostError
from sharded_pc.host import memory, system, userfaultfd
from sharded_pc.host.finding import Finding
from sharded_pc.host.limits import Limits
from sharded_pc.host.memory import require_memory
from sharded_pc.host.placement import choose_placement
from sharded_pc.host.userfaultfd import Probe

__all__ = [
    "Finding",
    "Limits",
    "Probe",
    "choose_placement",
    "findings",
    "require_host",
    "require_memory",
]


def findings(limits: Limits | None = None, probe: Probe | None = None) -> list[Finding]:
    """Everything that `sharded-pc check` shows: of this host, or of the one described."""
    return [*_of_the_kernel(limits, probe), system.qemu()]


def require_host(
    *, kernel_faults: bool = False, limits: Limits | None = None, probe: Probe | None = None
) -> None:
    """HostError with every required finding that failed, one per line: "name: detail; remedy".

    `kernel_faults`: a guest is to run here whose RAM the kernel itself touches (KVM, system calls).
    """
    needs = [_need(each, kernel_faults) for each in _of_the_kernel(limits, probe)]
    failed = [str(each) for each in needs if each.required and not each.ok]
    if failed:
        raise HostError("\n".join(failed))


def _of_the_kernel(limits: Limits | None, probe: Probe | None) -> list[Finding]:
    limits, probe = limits or Limits.read(), probe or Probe.read()
    return [
        *(judge(limits) for judge in system.JUDGES),
        *(judge(limits, probe) for judge in userfaultfd.JUDGES),
        *(judge(limits) for judge in memory.JUDGES),
    ]


def _need(finding: Finding, kernel_faults: bool) -> Finding:
    required = finding.required or (kernel_faults and finding.name == userfaultfd.KERNEL_FAULTS)
    return dataclasses.replace(finding, required=required)
