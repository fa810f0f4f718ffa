"""What may become of a migration, and what may not.

It may end in two ways only.  COMPLETED: no guest has seen a wrong byte.  CLEANLY failed: the
connection broke before the guest ran here, so that the source's guest goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.chaos.guest import Guest, Report
from tests.receiver import Outcome

COMPLETED, CLEANLY = "completed", "failed cleanly"
BEFORE_RUN = ("none", "advise", "discard", "listening")


class Wrong(AssertionError):
    """What must not happen."""


def told(outcome: Outcome) -> dict:
    """What a receiver has printed at its end; Wrong."""
    info = outcome.info
    if info is None:
        raise Wrong(f"the receiver ended with {outcome.exit_code} and told nothing")
    if (info["status"] == "completed") != (outcome.exit_code == 0):
        raise Wrong(f"{info['status']}, and yet the exit code is {outcome.exit_code}")
    return info


def of_receiver(info: dict, *, broke: bool) -> str:
    """COMPLETED or CLEANLY; Wrong.  `broke`: a connection, or a whole receiver."""
    if info["status"] == "completed":
        if info["ram"]["remaining"]:
            raise Wrong(f"completed, and yet {info['ram']['remaining']} bytes are missing")
        return COMPLETED
    if info["postcopy-state"] not in BEFORE_RUN:
        raise Wrong(f"the guest ran, and yet: {info['status']}, {info['error-desc']}")
    if not broke:
        raise Wrong(f"nothing broke, and yet: {info['error-desc']}")
    return CLEANLY


def of_guests(guests: Sequence[Guest], timeout: float) -> Report:
    """All that they have seen together; Wrong."""
    reports = [guest.report(timeout) for guest in guests]
    for report in reports:
        if report is None:
            raise Wrong("a guest waits for ever")
        if report.wrong or report.failed:
            raise Wrong(f"a guest: {report.wrong or report.failed}")
    return Report(sum(r.visits for r in reports), sum(r.written for r in reports))
