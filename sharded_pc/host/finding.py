"""One thing a host has or lacks."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """`required` means: nothing works without it; the others cost speed or a feature."""

    name: str
    ok: bool
    required: bool
    detail: str
    remedy: str | None
    """what mends it; None when it is ok"""

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" + (f"; {self.remedy}" if self.remedy else "")


def required(name: str, ok: bool, detail: str, remedy: str) -> Finding:
    return Finding(name, ok, True, detail, None if ok else remedy)


def optional(name: str, ok: bool, detail: str, remedy: str) -> Finding:
    return Finding(name, ok, False, detail, None if ok else remedy)


def fact(name: str, detail: str) -> Finding:
    """Something worth knowing that cannot be wrong."""
    return Finding(name, True, False, detail, None)
