"""What others have published of demand paging through one userfaultfd.

Other machines, other kernels, KVM guests: to be read beside what is measured here, never as a
ratio to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

CAVEAT = "published, other machines"


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """A series: pages per second of all vCPUs together, by number of vCPUs."""

    title: str
    setup: str
    source: str
    """a message on lore.kernel.org by its id"""
    pages_per_second: Mapping[int, float]


def _of_each(per_vcpu: Mapping[int, float]) -> dict[int, float]:
    return {vcpus: vcpus * rate for vcpus, rate in per_vcpu.items()}


MOORTHY = Published(
    "one userfaultfd (Moorthy 2023)",
    "demand_paging_test, shared memory, MINOR faults, as many readers as vCPUs, 256 CPUs",
    "https://lore.kernel.org/all/20230412213510.1220557-1-amoorthy@google.com/",
    {1: 150e3, 2: 191e3, 4: 210e3, 8: 155e3, 16: 130e3, 32: 108e3, 64: 86e3, 128: 62e3, 256: 36e3},
)
_HOUGHTON = "https://lore.kernel.org/all/20241204191349.1730936-1-jthoughton@google.com/"
HOUGHTON_ONE = Published(
    "one userfaultfd, one reader (Houghton 2024)",
    "demand_paging_test, shared memory, MINOR faults, 96 CPUs; published for each vCPU",
    _HOUGHTON,
    _of_each({2: 102e3, 8: 31.7e3, 64: 3.2e3}),
)
HOUGHTON_MANY = Published(
    "one userfaultfd, a reader per vCPU (Houghton 2024)",
    "demand_paging_test, shared memory, MINOR faults, 96 CPUs; published for each vCPU",
    _HOUGHTON,
    _of_each({2: 98e3, 8: 37.0e3, 64: 1.7e3}),
)
SINGLE = (MOORTHY, HOUGHTON_ONE, HOUGHTON_MANY)


def told() -> list[dict]:
    """For the report."""
    return [
        {
            "title": series.title,
            "kind": CAVEAT,
            "setup": series.setup,
            "source": series.source,
            "pages-per-second": {str(n): rate for n, rate in series.pages_per_second.items()},
        }
        for series in SINGLE
    ]


def lines() -> list[str]:
    """Below a table."""
    found = []
    for series in SINGLE:
        rates = ", ".join(f"{n}: {rate / 1e3:.0f}" for n, rate in series.pages_per_second.items())
        found += [f"{CAVEAT}: {series.title}, 1000 pages/s by vCPUs: {rates}", f"  {series.source}"]
    return found
