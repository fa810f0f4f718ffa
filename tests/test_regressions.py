"""Failures that were found once and must not come back; each says what happened."""

from __future__ import annotations

import os
import threading

import pytest

from sharded_pc import postcopy_ram as pc
from sharded_pc.geometry import PAGE_BYTES, Geometry, RamBlock
from sharded_pc.memory import GuestMemory
from sharded_pc.native.ram import Ram, Stop, Stopped, Stream
from sharded_pc.native.uffd import Uffd
from sharded_pc.wire import writer
from tests.test_postcopy_ram import GuestMapping

pytestmark = pytest.mark.uffd

BLOCK = RamBlock("pc.ram", 2 << 20)


@pytest.fixture
def mis(unique_name):
    with pc.MigrationIncomingState.create(unique_name, [BLOCK]) as state:
        pc.postcopy_ram_incoming_init(state, state.geometry.total // PAGE_BYTES)
        yield state


def touch(guest: GuestMapping, page: int) -> threading.Thread:
    """A thread that reads a page's first byte in C, without the GIL."""
    reader = os.memfd_create("touched")

    def read() -> None:
        # write(2) reads the page in the kernel: the thread waits there, other threads go on.
        os.write(reader, memoryview(guest.maps[0])[page * PAGE_BYTES :][:1])

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def test_a_guest_that_comes_again_is_woken(mis):
    """Its fault was read, it left, the page came, it came again with the same userfaultfd: nobody
    had woken it, and its fault is not raised again."""
    guest = GuestMapping(mis)
    mis.add_guest(0, guest.addresses, os.dup(guest.uffds[0].fd))
    pc.postcopy_ram_enable_notify(mis)
    vcpu = touch(guest, 3)
    assert mis.next_request(timeout=20) == (BLOCK.name, 3 * PAGE_BYTES)
    mis.worker.drop_guest(0, False)
    pc.postcopy_place_page(mis, mis.host(BLOCK.name, 3 * PAGE_BYTES), b"x" * PAGE_BYTES, BLOCK.name)
    assert vcpu.is_alive()
    mis.add_guest(0, guest.addresses, os.dup(guest.uffds[0].fd))
    vcpu.join(20)
    assert not vcpu.is_alive()


def test_a_zero_page_that_was_not_asked_for_is_answered_locally(mis):
    """It is a hole: waking the guest alone would make it fault for ever."""
    guest = GuestMapping(mis)
    mis.add_guest(0, guest.addresses, os.dup(guest.uffds[0].fd))
    pc.postcopy_ram_enable_notify(mis)
    pc.postcopy_place_page_zero(mis, mis.host(BLOCK.name, 0), BLOCK.name)
    vcpu = touch(guest, 0)
    vcpu.join(20)
    assert not vcpu.is_alive()
    assert guest.maps[0][:PAGE_BYTES] == bytes(PAGE_BYTES)
    assert mis.memory.control.shard(0).requests == 0


def test_a_wire_that_is_never_empty_sees_the_stop_switch(unique_name, tmp_path):
    """A file never blocks, so the switch was only looked at when its end was reached."""
    memory = GuestMemory.create(unique_name, 1)
    stop = Stop()
    try:
        memory.define(Geometry.of([BLOCK], 1))
        path = tmp_path / "records"
        path.write_bytes(writer.page(BLOCK.name, 0, b"x" * PAGE_BYTES) * 100)
        with path.open("rb") as file:
            stream = Stream(file.fileno(), stop)
            control, pool = memory.control, memory.pool.map
            ram = Ram(stream, control, memory.received, memory.requested, pool, stop)
            ram.use_block(0, memory.blocks[0].fd)
            stop.set()
            with pytest.raises(Stopped):
                ram.records()
            with pytest.raises(Stopped):
                stream.read(1)
            ram.release()
    finally:
        stop.close()
        memory.unlink()
        memory.close()


def test_events_are_not_asked_for():
    """A userfaultfd with events hands descriptors to whoever reads it; the attach server refuses
    those, so ours must not have any."""
    from sharded_pc.attach.guests import EVENTS, _features

    uffd, eventful = Uffd.open(), Uffd.open(1 << 3 | 1 << 5)
    try:
        assert _features(uffd.fd) & EVENTS == 0
        assert _features(eventful.fd) & EVENTS == 1 << 3
    finally:
        uffd.close()
        eventful.close()
