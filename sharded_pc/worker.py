"""One shard process: places its pages, answers its guests' faults.

Started by `shards/process.py` with the spawn method.  Its main thread obeys the
coordinator over a pipe; the placement loop and one fault loop for each guest run in C on threads of
their own.  It ends when told to, when the pipe closes (the coordinator is gone), or when a page
cannot be placed, which it reports first.

It starts without a shard, so that it can be started ahead of the need for it; the first message
says which shard it is.  Messages are tuples: the coordinator sends (word, *arguments) and gets
("ok", ...) or ("error", text) for each; ("placing", thread), ("broken", text) and
("guest-broken", slot, text) come unasked.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection

from sharded_pc import recording, threads
from sharded_pc.errors import AttachError, HostError, ShardedPcError
from sharded_pc.geometry import Placement
from sharded_pc.host import oom
from sharded_pc.memory import GuestMemory
from sharded_pc.native.control import POOL_BYTES_PER_SHARD
from sharded_pc.native.multifd import ChannelLoop
from sharded_pc.native.shard import Shard, allow_interrupts
from sharded_pc.native.uffd import Uffd

MADV_NOHUGEPAGE = getattr(mmap, "MADV_NOHUGEPAGE", 15)
INTERRUPT = signal.SIGRTMIN + 7
"""Interrupts a fault loop's blocking read."""


class ShardWorker:
    """One shard in this process: its mapping, its userfaultfd, its loops.

    `on_broken(text)` and `on_guest_broken(slot, text)` are called from the loops' threads.
    """

    def __init__(self, memory: GuestMemory, index: int) -> None:
        self.memory = memory
        self.index = index
        self.on_broken: Callable[[str], None] = lambda text: None
        self.on_guest_broken: Callable[[int, str], None] = lambda slot, text: None
        self._uffd: Uffd | None = None
        self._shard: Shard | None = None
        self._placing: threading.Thread | None = None
        self._guests: dict[int, tuple[int, threading.Thread | None]] = {}
        self._channels: list[tuple[ChannelLoop, list[int], threading.Thread]] = []
        self._listening = False
        self._back_fd = -1
        allow_interrupts(INTERRUPT)

    @property
    def pool(self) -> memoryview:
        """This shard's tmp pages."""
        size = POOL_BYTES_PER_SHARD
        return memoryview(self.memory.pool.map)[self.index * size : (self.index + 1) * size]

    @property
    def shard(self) -> Shard:
        assert self._shard is not None, "the geometry is not known yet"
        return self._shard

    def geometry(self) -> None:
        """The block list was read.  `copy` maps everything and registers it; `continue` works on
        guests' userfaultfds alone."""
        memory = self.memory
        memory.load()
        if memory.placement is Placement.COPY:
            self._uffd = Uffd.open()
        self._shard = Shard(
            memory.control,
            self.index,
            memory.received,
            memory.requested,
            memory.written,
            self.pool,
            self._uffd,
        )
        for index, block in enumerate(memory.blocks):
            self._shard.add_block(index, block.map if self._uffd else None, block.fd)

    def start_placing(self) -> int:
        """Serves the coordinator's rings on a thread of its own; the kernel's number of it."""
        thread = threading.Thread(target=self._place, name="placement")
        threads.start(thread)
        self._placing = thread
        assert thread.native_id is not None
        return thread.native_id

    def _place(self) -> None:
        try:
            self.shard.place_loop()
        except ShardedPcError as error:
            self.on_broken(str(error))

    def prepare(self) -> None:
        """Before discards: no huge page may hide a hole (postcopy_ram_prepare_discard).  With
        `continue` nothing is a hole that has to fault."""
        if self._uffd is None:
            return
        for block in self.memory.blocks:
            # EINVAL: this kernel has no transparent huge pages, which is as good.
            with contextlib.suppress(OSError):
                block.map.madvise(MADV_NOHUGEPAGE)

    def listen(self, back_fd: int = -1) -> None:
        """All discards are done: faults are answered from now on, missing pages requested on the
        wire `back_fd`, which becomes ours (-1: through the ring).  Once more when a paused
        migration goes on, by another wire."""
        self._listening = True
        self._use_wire(back_fd)
        self.shard.listen(self._back_fd)
        for slot in list(self._guests):
            self._start_faults(slot)
        self.shard.wake_all()

    def _use_wire(self, fd: int) -> None:
        """Fault loops may be writing: the number that they know becomes the other wire's."""
        if self._back_fd < 0:
            self._back_fd = fd
        elif fd >= 0:
            os.dup2(fd, self._back_fd, inheritable=False)
            os.close(fd)

    def add_guest(self, slot: int, addresses: Sequence[int], mode: int, uffd: int) -> None:
        """A guest attached; `uffd` becomes ours.  AttachError."""
        try:
            self.shard.add_guest(slot, uffd, addresses, mode)
        except AttachError:
            os.close(uffd)
            raise
        self._guests[slot] = (uffd, None)
        if self._listening:
            try:
                self._start_faults(slot)
            except HostError:
                self.drop_guest(slot, False)
                raise

    def _start_faults(self, slot: int) -> None:
        fd, thread = self._guests[slot]
        if thread is None:
            thread = threading.Thread(target=self._faults, args=(slot,), name=f"faults-{slot}")
            threads.start(thread)
            self._guests[slot] = (fd, thread)

    def _faults(self, slot: int) -> None:
        try:
            self.shard.fault_loop(slot)
        except AttachError as error:
            self.on_guest_broken(slot, str(error))

    def drop_guest(self, slot: int, release: bool) -> None:
        """A guest is gone, or needs us no more (`release`: everything has arrived)."""
        fd, thread = self._guests.pop(slot, (-1, None))
        if fd < 0:
            return
        self.shard.stop_guest(slot)
        if thread is not None:
            _interrupt(thread)
        self.shard.drop_guest(slot, release=release)
        os.close(fd)

    def receive_channel(self, number: int, fd: int, record: str | None = None) -> None:
        """A channel of multifd, straight into the blocks; `fd` becomes ours.  `record`: a file in
        which it is written down.  HostError."""
        memory = self.memory
        written = memory.written if memory.placement is Placement.CONTINUE else None
        blocks = [block.fd for block in memory.blocks]
        loop = ChannelLoop(memory.control, number, fd, memory.received, written, blocks)
        fds = [fd]
        if record is not None:
            fds.append(recording.append_to(record))
            loop.record(fds[-1])
        thread = threading.Thread(target=loop.run, name=f"channel-{number}")
        self._channels.append((loop, fds, thread))
        thread.start()

    def _end_channels(self) -> None:
        for loop, fds, thread in self._channels:
            loop.stop()
            thread.join()
            loop.release()
            for fd in fds:
                os.close(fd)
        self._channels.clear()

    def stop(self, *, release: bool = False) -> None:
        """Ends all loops; guests keep waiting for missing pages unless `release`."""
        self._end_channels()
        for slot in list(self._guests):
            self.drop_guest(slot, release)
        if self._shard is not None:
            self._shard.stop()
        if self._placing is not None:
            self._placing.join()

    def close(self) -> None:
        """After stop(): lets go of the mappings."""
        if self._shard is not None:
            self._shard.release()
            self._shard = None
        if self._back_fd >= 0:
            os.close(self._back_fd)
        if self._uffd is not None:
            self._uffd.close()


def _interrupt(thread: threading.Thread) -> None:
    """Signals until the thread has seen its stop flag: one signal can fall between its look at the
    flag and its read."""
    while thread.is_alive():
        signal.pthread_kill(thread.ident, INTERRUPT)
        thread.join(0.005)


class _Process:
    """The messages of the coordinator, obeyed one by one."""

    def __init__(self, conn: Connection, name: str) -> None:
        self._conn = conn
        self._send_lock = threading.Lock()
        self._memory = GuestMemory.open(name)
        self._worker: ShardWorker | None = None
        self._handlers: dict[str, Callable] = {"shard": self._shard}

    def send(self, *message: object) -> None:
        with self._send_lock, contextlib.suppress(BrokenPipeError):
            self._conn.send(message)

    def _shard(self, index: int) -> None:
        worker = self._worker = ShardWorker(self._memory, index)
        worker.on_broken = lambda text: self.send("broken", text)
        worker.on_guest_broken = lambda slot, text: self.send("guest-broken", slot, text)

        def geometry() -> None:
            worker.geometry()
            self.send("placing", worker.start_placing())

        def listen(wire: bool = False) -> None:
            """With `wire` its descriptor follows on the pipe."""
            worker.listen(reduction.recv_handle(self._conn) if wire else -1)

        def guest(slot: int, addresses: list[int], mode: int) -> None:
            """The userfaultfd follows on the pipe."""
            worker.add_guest(slot, addresses, mode, reduction.recv_handle(self._conn))

        def channel(number: int, record: str | None) -> None:
            """Its descriptor follows on the pipe."""
            worker.receive_channel(number, reduction.recv_handle(self._conn), record)

        self._handlers |= {
            "channel": channel,
            "geometry": geometry,
            "prepare": worker.prepare,
            "listen": listen,
            "guest": guest,
            "drop": worker.drop_guest,
        }

    def serve(self) -> None:
        """Until told to stop, or the coordinator is gone: then guests wait for its successor."""
        self.send("ok")
        with contextlib.suppress(EOFError, ConnectionResetError):
            while (message := self._conn.recv()) != ("stop",):
                self._obey(*message)
        if self._worker is not None:
            self._worker.stop()
            self._worker.close()  # in order: at exit the collector complains of views in use

    def _obey(self, word: str, *arguments: object) -> None:
        try:
            self._handlers[word](*arguments)
        except (ShardedPcError, OSError) as error:
            self.send("error", str(error))
        else:
            self.send("ok")


def main(conn: Connection, name: str) -> None:
    """Entry of the process."""
    try:
        oom.be_first()
        process = _Process(conn, name)
    except (ShardedPcError, OSError) as error:
        conn.send(("error", str(error)))
        return
    process.serve()
