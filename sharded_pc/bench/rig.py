"""The product without a source: memory, worker processes, attach socket, and C feeders.

Everything here but the feeders (native/lab/floor.h) is what a receiver runs.  With `continue` the
RAM is populated and filled once, as if the stream had written it, and stays so: what is measured is
how a page that stands there gets into a guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sharded_pc.attach.server import AttachServer
from sharded_pc.bench.bare import FILLING
from sharded_pc.bench.guest import GuestProcess
from sharded_pc.errors import ShardedPcError
from sharded_pc.geometry import PAGE_BYTES, Geometry, Placement, RamBlock
from sharded_pc.memory import GuestMemory
from sharded_pc.native import floor
from sharded_pc.native.floor import Kind, Touched
from sharded_pc.native.guests import Guests
from sharded_pc.native.ram import Ram, Stop, Stream
from sharded_pc.populate import Populator
from sharded_pc.shards import Shards

BLOCK = "bench.ram"
IDLE_SECONDS = 0.001
"""between two looks at the workers' rings"""
T = TypeVar("T")


class Rig:
    """One receiver's memory and workers: `async with Rig(name, size, workers) as rig`."""

    def __init__(
        self, name: str, size: int, workers: int, placement: Placement = Placement.COPY
    ) -> None:
        self._name, self._size, self._workers = name, size, workers
        self.placement = placement
        self._exit = contextlib.AsyncExitStack()
        self._stop = Stop()
        self._trouble: ShardedPcError | None = None
        self._shards: Shards
        self.memory: GuestMemory
        self.guest: GuestProcess | None = None

    async def __aenter__(self) -> Rig:
        try:
            await self._set_up()
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stop.set()
        await self._exit.aclose()

    async def _set_up(self) -> None:
        self._exit.callback(self._stop.close)
        self.memory = GuestMemory.create(self._name, self._workers)
        self._exit.callback(self._leave_memory)
        geometry = Geometry.of((RamBlock(BLOCK, self._size),), self._workers)
        self.memory.define(geometry, self.placement, "a benchmark")
        if self.placement is Placement.CONTINUE:
            await asyncio.to_thread(self._fill)
        self._guests = Guests(self.memory.control)
        self._guests.use_block(0, self.memory.blocks[0].fd)
        self._exit.callback(self._guests.close)
        self.memory.pool.map[:] = bytes([FILLING]) * self.memory.pool.size
        self._shards = Shards(self.memory, self._workers, self._guests)
        self._exit.push_async_callback(self._shards.stop)
        self._shards.on_trouble = self._on_trouble
        await self._shards.ready()
        for word in ("geometry", "prepare", "listen"):
            await self._shards.tell(word)

    def _fill(self) -> None:
        """The RAM is what a stream left there; nothing of it counts as received yet."""
        populator = Populator(self.memory)
        try:
            populator.start()
            populator.join()
        finally:
            populator.close()
        some = bytes([FILLING]) * self.memory.geometry.stripe_bytes
        with mmap.mmap(self.memory.blocks[0].fd, self._size) as ram:
            for at in range(0, self._size, len(some)):
                ram[at : at + len(some)] = some[: self._size - at]

    def _leave_memory(self) -> None:
        self.memory.unlink()
        self.memory.close()

    def _on_trouble(self, error: ShardedPcError) -> None:
        self._trouble = self._trouble or error
        self._abort()

    def _abort(self) -> None:
        """Lets every C loop of ours, and the guest's, come to its end."""
        self._stop.set()
        if self.guest is not None:
            self.guest.kill()

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs a C loop on a thread and never leaves it behind, for it uses our mappings."""
        task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._abort()
            await asyncio.gather(task, return_exceptions=True)
            raise
        except ShardedPcError as error:
            raise self._trouble or error from error

    @property
    def stripe_pages(self) -> int:
        assert self.memory.geometry is not None
        return self.memory.geometry.stripe_pages

    async def feed(self, kind: Kind, batch: int) -> int:
        """Hands the whole block to the workers; nanoseconds until they have done it."""
        control, stop = self.memory.control, self._stop
        return await self.call(floor.feed_block, control, 0, kind, batch, stop)

    async def receive_all(self) -> int:
        """Every page has arrived, as zeros (`copy`) or as it stands (`continue`): what it reads."""
        if self.placement is Placement.COPY:
            await self.feed(Kind.ZERO, self.stripe_pages)
            return 0
        self.memory.received.set(0, self._size // PAGE_BYTES)
        return FILLING

    async def renew(self) -> None:
        """Everything is missing again and nothing counts as requested: the workers discard it
        (`copy`), or it stays where it is and the guest forgets where that was (`continue`)."""
        pages = self._size // PAGE_BYTES
        if self.placement is Placement.COPY:
            await self.feed(Kind.DISCARD, self.stripe_pages)
        else:
            await self._idle()
            if self.guest is not None:
                await self.call(self.guest.forget)
            self.memory.received.clear(0, pages)
        self.memory.requested.clear(0, pages)

    async def _idle(self) -> None:
        """Returns when the workers have mapped whatever they were handed."""
        while any(shard.queued for shard in self.memory.control.shards()):
            if self._trouble is not None:
                raise self._trouble
            await asyncio.sleep(IDLE_SECONDS)

    def copies(self) -> int:
        """UFFDIO_COPY calls so far."""
        return sum(shard.copies for shard in self.memory.control.shards())

    def receive(self, fd: int) -> None:
        """Takes one RAM section off a socket, as a receiver does after LISTENING; blocks."""
        memory = self.memory
        stream = Stream(fd, self._stop)
        ram = Ram(
            stream, memory.control, memory.received, memory.requested, memory.pool.map, self._stop
        )
        try:
            ram.use_block(0, memory.blocks[0].fd)
            ram.enter_postcopy()
            ram.records()
            ram.drain()
        finally:
            ram.release()

    async def attach_guest(self) -> GuestProcess:
        """Starts a guest process, attached over a real attach socket."""
        folder = self._exit.enter_context(tempfile.TemporaryDirectory(prefix="sharded-pc-bench-"))
        path = str(Path(folder) / "attach")
        server = AttachServer(path, self.memory, self._shards.add_guest, self._shards.drop_guest)
        self._exit.push_async_callback(server.close)
        server.geometry_known()
        server.ready()
        self.guest = GuestProcess(path, BLOCK)
        self._exit.callback(self.guest.close)
        await self.call(self.guest.wait_attached)
        return self.guest

    async def touch(self, seed: int | None, threads: int, expected: int) -> Touched:
        """GuestProcess.touch, while a C loop answers requests in the place of return path, wire and
        source.  It has ended when this returns: feed() writes into the same rings."""
        assert self.guest is not None
        stop = Stop()
        service = asyncio.ensure_future(asyncio.to_thread(self._serve, stop))
        try:
            return await self.call(self.guest.touch, seed, threads, expected)
        finally:
            stop.set()
            await asyncio.gather(service, return_exceptions=True)  # workers tell of their trouble
            stop.close()

    def _serve(self, stop: Stop) -> None:
        memory = self.memory
        floor.feed_requests(self._guests, memory.received, memory.pool.map, stop)
