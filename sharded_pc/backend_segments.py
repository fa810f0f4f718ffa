"""Segments of a destination's memory backends, made from its command line: QEMU is up before the
source's block list says what they are there for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from sharded_pc import shm
from sharded_pc.errors import HostError
from sharded_pc.geometry import Geometry, Placement, RamBlock
from sharded_pc.shm import ROOT, Segment


class BackendSegments:
    """One for each block of `geometry`, whose names are the backends' ids.  They are dealt to
    shards, and registered by QEMU, as they will be when they are the first blocks of the guest's
    whole geometry (`whole`)."""

    def __init__(self, receiver: str, geometry: Geometry, segments: list[Segment]) -> None:
        self._receiver = receiver
        self.geometry = geometry
        self.segments = segments
        self.placement = Placement.COPY
        self.placement_reason = ""

    @classmethod
    def make(
        cls, receiver: str, geometry: Geometry, placement: tuple[Placement, str], *, reserve: bool
    ) -> BackendSegments:
        """All holes, unless `reserve`; `placement` with its reason.  HostError: nothing stays."""
        made = cls(receiver, geometry, [])
        made.placement, made.placement_reason = placement
        try:
            for block in geometry.blocks:
                name = shm.block_segment_name(receiver, block.name)
                made.segments.append(Segment.create(name, block.size, reserve=reserve))
        except BaseException:
            made.unlink()
            made.close()
            raise
        return made

    @property
    def paths(self) -> dict[str, str]:
        """Each backend's file, by its id."""
        names = (str(ROOT / segment.name.lstrip("/")) for segment in self.segments)
        return dict(zip((block.name for block in self.geometry.blocks), names, strict=True))

    def whole(self, found: Sequence[RamBlock], blocks: Sequence[RamBlock]) -> Geometry:
        """The guest's geometry: the blocks `found` for the backends, in their order, before the
        rest of the source's `blocks`."""
        names = {block.name for block in found}
        rest = [block for block in blocks if block.name not in names]
        return Geometry((*found, *rest), self.geometry.shards, self.geometry.stripe_bytes)

    def hand_over(self, found: Sequence[RamBlock]) -> list[Segment]:
        """They become the segments of the blocks `found`, and those their owner's.  HostError."""
        for segment, block in zip(self.segments, found, strict=True):
            self._rename(segment, shm.block_segment_name(self._receiver, block.name))
        segments, self.segments = self.segments, []
        return segments

    def _rename(self, segment: Segment, name: str) -> None:
        """link() replaces nothing: what stands there is somebody else's."""
        if segment.name == name:
            return
        old, new = (ROOT / each.lstrip("/") for each in (segment.name, name))
        try:
            os.link(old, new)
        except OSError as error:
            raise HostError(f"name the shared memory {old} {new}: {error.strerror}") from error
        segment.unlink()
        segment.name = name

    def unlink(self) -> None:
        for segment in self.segments:
            segment.unlink()

    def close(self) -> None:
        for segment in self.segments:
            with contextlib.suppress(BufferError):
                segment.close()
