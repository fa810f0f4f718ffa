"""What a receiver is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharded_pc import runtime_folder
from sharded_pc.address import Address
from sharded_pc.attach.server import STEP_SECONDS
from sharded_pc.geometry import Placement

if TYPE_CHECKING:
    from sharded_pc.transport.tls.credentials import Credentials


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `receive` is told; paths are file-system paths, None: not wanted."""

    incoming: Address | None
    """None: only with `resume`"""
    name: str
    workers: int = 2
    placement: Placement | None = None
    """None: what this host does best"""
    attach: str | None = None
    control: str | None = None
    resume: bool = False
    """takes a dead receiver of this name up, whose guest has run; if there is none, a new migration
    comes to `incoming`"""
    recover_uri: Address | None = None
    """where the source of a paused migration may come again, unasked"""
    switchover_ack: bool = False
    """the source's capability of this name is on: it is told that it may switch"""
    tls: Credentials | None = None
    """what a source must show; None: the stream is plain"""
    record: str | None = None
    keep: bool = False
    reserve: bool = False
    """all RAM is allocated when the block list is here"""
    status_fd: int | None = None
    stripe_bytes: int | None = None
    """None: geometry.default_stripe_bytes"""
    attach_step_seconds: float = STEP_SECONDS
    """patience with a client in the middle of the hand-over"""
    runs: bool = False
    """the guest is that of a QEMU which is ours to start and to watch"""
    qemu: tuple[str, ...] = ()
    """command line of a destination to resume; (): none"""
    launch: Callable[..., Awaitable[Any]] | None = None
    """how it is started (destination.Launch); None: as a child"""
    monitor: str | None = None
    """the listening socket of its monitor, where somebody manages it: "fd:N" or a path"""
    stream_fds: tuple[int, ...] = ()
    """descriptors given to QEMU, and to us, that `migrate-incoming fd:N` there may name"""

    @property
    def needs_folder(self) -> bool:
        """Some socket stands in the runtime folder."""
        own = runtime_folder.places(self.name)[0]
        return (
            self.runs
            or bool(self.qemu)
            or any(
                path is not None and Path(path).parent == own
                for path in (self.attach, self.control)
            )
        )
