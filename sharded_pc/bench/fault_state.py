"""The saved state of the guest of `bench fault --peer`, from one real migration of a real QEMU."""

from __future__ import annotations

import dataclasses
import struct
import time
from pathlib import Path

from sharded_pc.bench import fault_image, recording
from sharded_pc.bench.fault_image import MIB
from sharded_pc.bench.peer import QemuPeer
from sharded_pc.bench.product import Product
from sharded_pc.errors import GuestLost, HostError
from sharded_pc.wire import events
from sharded_pc.wire.constants import Cmd, Section
from sharded_pc.wire.feed import read_stream

PRECOPY_RATE = MIB
"""Bytes a second until the switch, which is asked for at once."""
CLOCK_SECONDS = 0.5
"""Less than the low half of the time stamp counter takes to wrap, up to 8 GHz."""
CLOCK_READS = 8
BOOT_SECONDS = 30.0
RAM_BLOCK = "pc.ram"
_COMMAND = struct.Struct(">BHHI")


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What a source sends of a guest that waits for its flag."""

    setup: bytes
    """the stream through the end of the set-up section"""
    memory: dict[str, bytearray]
    """content of every block"""
    package: bytes
    """the PACKAGED command with its blob"""
    machine: str
    ticks_per_us: float
    """of the guest's time stamp counter"""


def save(folder: Path, name: str, command: tuple[str, ...], console: Path) -> State:
    """Boots the guest, calibrates its clock and migrates it into a recording receiver.

    `name`: of the receiver's shared memory.  GuestLost, HostError.
    """
    file = folder / "state"
    address = f"unix:{folder / 'state.sock'}"
    source = QemuPeer(command, folder, name="source", stopped=False, incoming=False)
    receiver = Product(folder, name, address, "--record", str(file))
    with source, receiver:
        wait_for_console(console, len(fault_image.READY), source)
        rate = _ticks_per_us(source)
        _migrate(source, receiver.uri)
        if receiver.finish().exit_code:
            raise HostError(f"the receiver that saves the guest failed: {receiver.last_words()}")
    state = _read(file, rate)
    file.unlink()
    return state


def wait_for_console(console: Path, length: int, peer: QemuPeer | Product) -> bytes:
    """What the guest has written, as soon as that is `length` bytes; GuestLost."""
    deadline = time.monotonic() + BOOT_SECONDS
    while not console.exists() or console.stat().st_size < length:
        if isinstance(peer, Product) and not peer.alive():
            raise GuestLost(f"the receiver ended: {peer.last_words()}")
        if isinstance(peer, QemuPeer):
            peer.cpu_seconds()  # GuestLost if it has ended
        if time.monotonic() > deadline:
            raise GuestLost(f"the guest wrote no {length} bytes in {BOOT_SECONDS:.0f} s")
        time.sleep(0.005)
    return console.read_bytes()


def _migrate(source: QemuPeer, uri: str) -> None:
    on = [{"capability": "postcopy-ram", "state": True}]
    source.qmp("migrate-set-capabilities", capabilities=on)
    rates = {"max_bandwidth": PRECOPY_RATE, "max_postcopy_bandwidth": 0}
    source.qmp("migrate-set-parameters", **rates)
    source.qmp("migrate", uri=uri)
    source.qmp("migrate-start-postcopy")
    source.wait("completed")


def _ticks_per_us(source: QemuPeer) -> float:
    """Of the clock that the guest writes down while it waits."""
    (began, first), _, (ended, last) = (
        _read_clock(source), time.sleep(CLOCK_SECONDS), _read_clock(source)
    )  # fmt: skip
    rate = (last - first) % (1 << 32) / (ended - began) * 1000
    if rate < 1:
        raise HostError("the guest's time stamp counter does not advance with time")
    return rate


def _read_clock(source: QemuPeer) -> tuple[float, int]:
    """(nanoseconds, ticks) of the reading that took the least time."""
    reads = []
    for _ in range(CLOCK_READS):
        before = time.monotonic_ns()
        ticks = int.from_bytes(source.guest_memory(fault_image.CLOCK, 4), "little")
        after = time.monotonic_ns()
        reads.append((after - before, (before + after) / 2, ticks))
    _, when, ticks = min(reads)
    return when, ticks


def _read(file: Path, ticks_per_us: float) -> State:
    found, data = recording.read(file), file.read_bytes()
    *_, length = _COMMAND.unpack_from(data, found.package_at)
    package = data[found.package_at : found.package_at + _COMMAND.size + length]
    assert package[:3] == struct.pack(">BH", Section.COMMAND, Cmd.PACKAGED)
    setup = data[: found.setup_end]
    return State(setup, _memory(data), package, found.machine, ticks_per_us)


def _memory(data: bytes) -> dict[str, bytearray]:
    """The last that was sent of every page."""
    memory: dict[str, bytearray] = {}
    for event in read_stream().feed(data):
        match event:
            case events.RamBlocks(blocks):
                memory = {block.name: bytearray(block.size) for block in blocks}
            case events.RamPage(block, offset, page):
                memory[block][offset : offset + len(page)] = page
            case events.RamZeroPage(block, offset):
                memory[block][offset : offset + 4096] = bytes(4096)
    return memory
