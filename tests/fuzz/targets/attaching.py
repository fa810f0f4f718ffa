"""The attach protocol, either side: JSON off a socket, then checked: a message or AttachError."""

from __future__ import annotations

from collections.abc import Callable

from sharded_pc.attach import protocol
from sharded_pc.errors import AttachError
from sharded_pc.geometry import Geometry, RamBlock
from sharded_pc.transport.fds import encode
from sharded_pc.transport.json_stream import JsonSplitter

RAM = Geometry.of([RamBlock("pc.ram", 16 << 20), RamBlock("pc.bios", 256 << 10)], 2)
TOKENS = (
    b'{"attach":{"version":1,"modes":["missing"]}}',
    b'{"mappings":{"addresses":{"pc.ram":4096}}}',
    b'"first-stripe":0',
    b'"page-size":4096',
    b"null",
    b"true",
    b"1e999",
    b"-1",
    b"[]",
    b"{}",
    b'""',
    b"18446744073709551615",
)


def one_input(data: bytes) -> None:
    splitter = JsonSplitter()
    splitter.feed(data)
    try:
        while (message := splitter.take()) is not None:
            for check in (_attach, _mappings, _geometry):
                _refused_or_good(check, message)
    except ValueError:
        pass


def _refused_or_good(check: Callable[[object], None], message: object) -> None:
    try:
        check(message)
    except AttachError as error:
        encode(protocol.error(str(error)))  # the peer is told


def _attach(message: object) -> None:
    assert protocol.check_attach(message)


def _mappings(message: object) -> None:
    addresses = protocol.check_mappings(message, RAM)
    assert len(addresses) == len(RAM.blocks)
    for address, block in zip(addresses, RAM.blocks, strict=True):
        assert 0 <= address < (1 << 64) - block.size and address % block.page_size == 0


def _geometry(message: object) -> None:
    offer = protocol.check_geometry(message)
    assert isinstance(offer.name, str) and offer.mode in (None, *protocol.MODES)
    sizes = [offer.ram.shards, offer.ram.stripe_bytes]
    for block in offer.ram.blocks:
        assert isinstance(block.name, str)
        sizes += [block.size, block.page_size]
    assert all(type(size) is int and size > 0 for size in sizes)
