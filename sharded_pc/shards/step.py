"""What a worker has to be told so that it serves its shard."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One message.  A shard remembers those that hold, and tells them to each of its workers in
    their order: so a successor comes to where its predecessor was."""

    word: str
    arguments: tuple = ()
    fd: int = -1
    """a descriptor that follows, not this step's to close"""
    slot: int | None = None
    """the guest it is about: a worker that cannot serve it serves the others"""
