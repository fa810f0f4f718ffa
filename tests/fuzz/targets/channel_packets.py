"""A channel of multifd: with either placement the C loop makes of it what the reference makes."""

from __future__ import annotations

import contextlib

from sharded_pc.geometry import Placement
from sharded_pc.wire import multifd
from tests.packet_cases import BLOCKS, Core, Seen, Zlib, packet, reference, sync

TOKENS = (
    packet(0, 1),
    packet(1, 2, zero=(3, 299)),
    packet(2, zero=(1, 2)),
    packet(3, 1, block=BLOCKS[1].name),
    sync(4),
    Zlib().packet(5, 1, 2),
    *(number.to_bytes(4, "big") for number in (1, 2, 127, 128, 129, 4096)),
    *(flag.to_bytes(4, "big") for flag in multifd.Flag),
)
ELSEWHERE = "zstd"
"""Python before 3.14 cannot unpack it; the loop may."""


def one_input(data: bytes) -> None:
    want = reference(data, 4096)
    for placement in (Placement.COPY, Placement.CONTINUE):
        with contextlib.ExitStack() as stack:
            compare(Core(placement, stack).run(data, 4096), want)


def compare(seen: Seen, want: Seen) -> None:
    """What was good is in memory.  A part of one that is cut or does not unpack may be, too."""
    if want.error is None and seen.error is None:
        assert seen == want
    elif ELSEWHERE not in (want.error or ""):
        assert seen.error == (want.error or multifd.cut().what)
    for name, pages in want.received.items():
        assert set(pages) <= set(seen.received[name])
