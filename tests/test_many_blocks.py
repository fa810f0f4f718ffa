"""As many blocks as there may be, of sizes that nothing divides."""

from __future__ import annotations

import contextlib

import pytest

from sharded_pc.errors import RemoteProtocolError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.wire.constants import MAX_BLOCKS
from tests.control import Control
from tests.guest_process import GuestProcess
from tests.synthetic import (
    STRIPE_BYTES,
    WAIT_S,
    ChangingOracle,
    Receiving,
    open_source,
)
from tests.test_recovery import cut, recovered

pytestmark = [pytest.mark.uffd, pytest.mark.usefixtures("placement")]

STRIPE_PAGES = STRIPE_BYTES // PAGE_BYTES
SIZES = (1, 3, STRIPE_PAGES - 1, STRIPE_PAGES + 1, 5 * STRIPE_PAGES + 7, 513)
"""Pages: of a ROM, around a stripe, around a huge page."""
MANY = ChangingOracle(
    tuple(
        RamBlock(f"/objects/dimm-{n:03}/" + "x" * (n % 200), SIZES[n % len(SIZES)] * PAGE_BYTES)
        for n in range(MAX_BLOCKS)
    ),
    seed=250,
    dirty_share=0.65,
)


def test_many_blocks_of_odd_sizes(tmp_path, unique_name):
    """Faults in all of them, a cut and a recovery, whose bitmaps end where no word does."""
    path = str(tmp_path / "control")
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(Receiving(tmp_path, unique_name, workers=3, control=path))
        source = stack.enter_context(open_source(receiver.sock, MANY))
        guest = stack.enter_context(GuestProcess(MANY))
        control = stack.enter_context(contextlib.closing(Control(path)))
        source.begin()
        source.wait_switched()
        guest.ask("attach", receiver.attach)
        guest.say("visit_all", seed=1, threads=2)
        source.request()  # of some block; it is asked for again after the cut
        cut(source)
        control.wait_status("postcopy-paused")
        with recovered(source, control, f"unix:{tmp_path}/again"):
            source.end()
            assert guest.answer(WAIT_S) == []
            info = receiver.finish()
    assert [block["received-pages"] for block in info["blocks"]] == [b.pages for b in MANY.blocks]


def test_one_block_too_many(tmp_path, unique_name):
    """Refused while the source's guest still runs."""
    blocks = tuple(RamBlock(f"b{n}", PAGE_BYTES) for n in range(MAX_BLOCKS + 1))
    with (
        Receiving(tmp_path, unique_name) as receiver,
        open_source(receiver.sock, ChangingOracle(blocks)) as source,
    ):
        with contextlib.suppress(OSError):
            source.set_up()
        with pytest.raises(RemoteProtocolError, match=f"more than {MAX_BLOCKS} RAM blocks"):
            receiver.finish()
