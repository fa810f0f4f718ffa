"""What the parsers of this package ask for, beside the wishes of wire/steps.py.

=================  ============================================================
yields             is sent
=================  ============================================================
``Ahead(n)``       the next n bytes, fewer at the end; they stay
``Skip(n)``        None; n bytes are passed over
``Footer(id, n)``  how many bytes stand before the section's footer, which is
                   next now; None if there is none in n bytes (or in what is
                   left of the stream); all but the last ``TAIL`` are passed
``PAGES``          None; plain pages of the block named last are passed over
``BEGIN``          None; a message begins
=================  ============================================================
"""

from __future__ import annotations

import dataclasses
import enum

TAIL = 64
"""Bytes: more than the commands at the end of a package."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ahead:
    most: int


@dataclasses.dataclass(frozen=True, slots=True)
class Skip:
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Footer:
    section: int
    most: int | None


class _Wish(enum.Enum):
    PAGES = "pages"
    BEGIN = "begin"


PAGES = _Wish.PAGES
BEGIN = _Wish.BEGIN
