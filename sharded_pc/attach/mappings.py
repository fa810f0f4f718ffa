"""What a process has mapped where: a guest's word about its addresses, checked."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sharded_pc.errors import AttachError
from sharded_pc.shm import Segment

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps (proc(5)); addresses and offset in bytes."""

    start: int
    end: int
    shared: bool
    offset: int
    inode: int


def mappings_of(pid: int) -> Iterator[Mapping]:
    """All mappings of a process, ascending; OSError if they may not be read."""
    # As bytes: a file's name may hold anything that text would be cut at.
    for line in Path(f"/proc/{pid}/maps").read_bytes().split(b"\n")[:-1]:
        span, flags, offset, _, inode, *_ = line.split()
        start, end = (int(part, 16) for part in span.split(b"-"))
        yield Mapping(start, end, flags[3:4] == b"s", int(offset, 16), int(inode))


def check_mapped(pid: int, segments: Sequence[Segment], addresses: Sequence[int]) -> None:
    """AttachError unless the process has each segment mapped, shared and whole, at its address (0:
    not mapped).  Who may not be looked at is believed: it can only write what it could anyway."""
    try:
        found = list(mappings_of(pid))
    except OSError as error:
        log.info("the mappings of guest process %d may not be read: %s", pid, error)
        return
    for segment, address in zip(segments, addresses, strict=True):
        if address:
            _check_segment(found, segment, address)


def _check_segment(found: Sequence[Mapping], segment: Segment, address: int) -> None:
    """Registered stripes are mappings of their own: together they must be the segment."""
    inode, reached = os.fstat(segment.fd).st_ino, address
    for each in found:
        if each.start <= reached < each.end:
            ours = each.shared and each.inode == inode
            if not ours or each.offset - each.start != -address:
                break
            reached = each.end
    if reached < address + segment.size:
        raise AttachError(
            f"address {address:#x} is not where the guest has {segment.name} mapped: "
            f"{reached - address:#x} of {segment.size:#x} bytes are"
        )
