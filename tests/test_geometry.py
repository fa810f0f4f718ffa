"""How RAM is dealt to shards: arithmetic, and the C core's answer to the same question."""

from __future__ import annotations

import contextlib
import mmap
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_pc import geometry as g
from sharded_pc.errors import HostError
from sharded_pc.geometry import PAGE_BYTES, Geometry, RamBlock
from sharded_pc.native.control import MAX_SHARDS, Control, control_bytes
from sharded_pc.native.core import lib

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    pages = draw(st.lists(st.integers(1, 700), min_size=1, max_size=6))
    blocks = [RamBlock(f"block{n}", count * PAGE_BYTES) for n, count in enumerate(pages)]
    stripe = draw(st.integers(1, 4)) * 64 * PAGE_BYTES
    return Geometry.of(blocks, draw(st.integers(1, MAX_SHARDS)), stripe)


@contextlib.contextmanager
def published(geometry: Geometry):
    """The geometry in a control segment."""
    with mmap.mmap(-1, control_bytes(geometry.shards)) as memory:
        control = Control(memory)
        try:
            control.init(geometry.shards, os.getpid())
            control.publish(geometry)
            yield control
        finally:
            control.release()


@given(geometries())
def test_extents_cover_each_block_once(geometry: Geometry) -> None:
    ends = dict.fromkeys((block.name for block in geometry.blocks), 0)
    for extent in geometry.extents():
        assert extent.offset == ends[extent.block]
        assert 0 < extent.size <= geometry.stripe_bytes
        ends[extent.block] += extent.size
    assert ends == {block.name: block.size for block in geometry.blocks}


@given(geometries())
def test_stripes_are_dealt_in_turn(geometry: Geometry) -> None:
    shards = [extent.shard for extent in geometry.extents()]
    assert shards == [n % geometry.shards for n in range(len(shards))]


@given(geometries())
def test_shard_of_every_edge_of_an_extent(geometry: Geometry) -> None:
    for extent in geometry.extents():
        first = extent.offset // PAGE_BYTES
        for page in (first, first + extent.size // PAGE_BYTES - 1):
            assert geometry.shard_of(extent.block, page) == extent.shard


@settings(deadline=None)
@given(geometries(), st.data())
def test_core_routes_alike(geometry: Geometry, data: st.DataObject) -> None:
    with published(geometry) as control:
        assert control.geometry == geometry
        for index, block in enumerate(geometry.blocks):
            some = data.draw(st.lists(st.integers(0, block.pages - 1), max_size=30))
            for page in (0, block.pages - 1, *some):
                core = lib.sp_view_shard_of(control.raw, index, page)
                assert core == geometry.shard_of(block.name, page), (block.name, page)


@settings(deadline=None)
@given(geometries())
def test_words_of_the_bitmaps_belong_to_one_block(geometry: Geometry) -> None:
    """Two shards never write one word: blocks start on words, and stripes are whole words."""
    with published(geometry) as control:
        bit = 0
        for index, block in enumerate(geometry.blocks):
            assert control.block(index) == (block.name, block.size, bit)
            bit += -(-block.pages // 64) * 64
        assert control.n_bits == bit


@pytest.mark.parametrize(
    ("total", "stripe"),
    [
        (PAGE_BYTES, 2 * MIB),
        (16 * GIB, 2 * MIB),
        (16 * GIB + PAGE_BYTES, 4 * MIB),
        (32 * GIB, 4 * MIB),
        (TIB, 128 * MIB),
        (64 * TIB, 8 * GIB),
    ],
)
def test_default_stripe(total: int, stripe: int) -> None:
    assert g.default_stripe_bytes(total) == stripe
    assert Geometry.of([RamBlock("pc.ram", total)], 4).stripe_bytes == stripe


@given(st.integers(1, 64 * TIB))
def test_default_stripes_are_few_and_not_small(total: int) -> None:
    stripe = g.default_stripe_bytes(total)
    assert stripe >= g.MIN_STRIPE_BYTES and stripe & (stripe - 1) == 0
    assert total <= stripe * g.MAX_STRIPES
    assert stripe == g.MIN_STRIPE_BYTES or total > stripe // 2 * g.MAX_STRIPES


def test_blocks_by_name() -> None:
    blocks = (RamBlock("pc.ram", 4 * MIB), RamBlock("pc.bios", PAGE_BYTES))
    geometry = Geometry.of(blocks, 2)
    assert (geometry.total, geometry.stripe_pages) == (4 * MIB + PAGE_BYTES, 512)
    assert geometry.block("pc.bios") is blocks[1] and geometry.index("pc.bios") == 1
    for ask in (geometry.block, geometry.index, lambda name: geometry.shard_of(name, 0)):
        with pytest.raises(KeyError, match=r"pc\.rom"):
            ask("pc.rom")


@pytest.mark.parametrize(
    ("blocks", "stripe"),
    [
        ([RamBlock("a", PAGE_BYTES)], 63 * PAGE_BYTES),
        ([RamBlock("a", PAGE_BYTES + 1)], 64 * PAGE_BYTES),
        ([RamBlock("", PAGE_BYTES)], 64 * PAGE_BYTES),
        ([RamBlock("n" * 256, PAGE_BYTES)], 64 * PAGE_BYTES),
        ([RamBlock("a", PAGE_BYTES)] * 2, 64 * PAGE_BYTES),
        ([RamBlock(f"b{n}", PAGE_BYTES) for n in range(251)], 64 * PAGE_BYTES),
    ],
    ids=["stripe", "size", "no name", "long name", "twice", "many"],
)
def test_core_refuses(blocks: list[RamBlock], stripe: int) -> None:
    with pytest.raises(HostError), published(Geometry(tuple(blocks), 1, stripe)):
        pass
