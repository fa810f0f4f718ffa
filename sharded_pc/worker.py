"""One shard process: places its pages, answers its guests' faults.

Started by `shards.py` with the spawn method before the stream begins.  Its main thread obeys the
coordinator over a pipe; the placement loop and one fault loop for each guest run in C on threads of
their own.  It ends when told to, when the pipe closes (the coordinator is gone), or when a page
cannot be placed, which it reports first.

Messages are tuples: the coordinator sends (word, *arguments) and gets ("ok", ...) or
("error", text) for each; ("broken", text) and ("guest-broken", slot, text) come unasked.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import threading
from multiprocessing import reduction
from multiprocessing.connection import Connection

from sharded_pc.errors import AttachError, ShardedPcError
from sharded_pc.memory import GuestMemory
from sharded_pc.native.control import POOL_BYTES_PER_SHARD
from sharded_pc.native.shard import Shard
from sharded_pc.native.uffd import Uffd

MADV_NOHUGEPAGE = getattr(mmap, "MADV_NOHUGEPAGE", 15)
INTERRUPT = signal.SIGUSR1
"""Interrupts a fault loop's blocking read."""


class Worker:
    """The shard's state in this process; one method for each message."""

    def __init__(self, conn: Connection, name: str, index: int) -> None:
        self._conn = conn
        self._send_lock = threading.Lock()
        self.memory = GuestMemory.open(name)
        self.index = index
        self._uffd = Uffd.open()
        pool = memoryview(self.memory.pool.map)[index * POOL_BYTES_PER_SHARD :]
        self._shard: Shard | None = None
        self._pool = pool[:POOL_BYTES_PER_SHARD]
        self._placing: threading.Thread | None = None
        self._guests: dict[int, tuple[int, threading.Thread | None]] = {}
        self._listening = False

    def send(self, *message: object) -> None:
        with self._send_lock, contextlib.suppress(BrokenPipeError):
            self._conn.send(message)

    @property
    def shard(self) -> Shard:
        assert self._shard is not None, "the geometry is not known yet"
        return self._shard

    def geometry(self) -> None:
        """The block list was read: map everything and start placing."""
        memory = self.memory
        memory.load()
        self._shard = Shard(
            memory.control, self.index, memory.received, memory.requested, self._pool, self._uffd
        )
        for index, block in enumerate(memory.blocks):
            self._shard.add_block(index, block.map, block.fd)
        self._placing = threading.Thread(target=self._place, name="placement")
        self._placing.start()

    def _place(self) -> None:
        try:
            self.shard.place_loop()
        except ShardedPcError as error:
            self.send("broken", str(error))

    def prepare(self) -> None:
        """Before discards: no huge page may hide a hole (postcopy_ram_prepare_discard)."""
        for block in self.memory.blocks:
            # EINVAL: this kernel has no transparent huge pages, which is as good.
            with contextlib.suppress(OSError):
                block.map.madvise(MADV_NOHUGEPAGE)

    def listen(self) -> None:
        """All discards are done: faults may be answered."""
        self._listening = True
        for slot in list(self._guests):
            self._start_faults(slot)
        self.shard.wake_all()

    def guest(self, slot: int, addresses: list[int], mode: int) -> None:
        """A guest attached; its userfaultfd for this shard follows on the pipe."""
        fd = reduction.recv_handle(self._conn)
        try:
            self.shard.add_guest(slot, fd, addresses, mode)
        except AttachError:
            os.close(fd)
            raise
        self._guests[slot] = (fd, None)
        if self._listening:
            self._start_faults(slot)

    def _start_faults(self, slot: int) -> None:
        fd, thread = self._guests[slot]
        if thread is None:
            thread = threading.Thread(target=self._faults, args=(slot,), name=f"faults-{slot}")
            self._guests[slot] = (fd, thread)
            thread.start()

    def _faults(self, slot: int) -> None:
        try:
            self.shard.fault_loop(slot)
        except AttachError as error:
            self.send("guest-broken", slot, str(error))

    def drop(self, slot: int, release: bool) -> None:
        """A guest is gone, or needs us no more (`release`)."""
        fd, thread = self._guests.pop(slot, (-1, None))
        if fd < 0:
            return
        self.shard.stop_guest(slot)
        if thread is not None:
            _interrupt(thread)
        self.shard.drop_guest(slot, release=release)
        os.close(fd)

    def stop(self) -> None:
        """Ends all loops."""
        for slot in list(self._guests):
            self.drop(slot, False)
        if self._shard is not None:
            self._shard.stop()
        if self._placing is not None:
            self._placing.join()

    def obey(self, word: str, arguments: tuple) -> None:
        """One message, answered."""
        handler = {
            "geometry": self.geometry,
            "prepare": self.prepare,
            "listen": self.listen,
            "guest": self.guest,
            "drop": self.drop,
        }[word]
        try:
            handler(*arguments)
        except (ShardedPcError, OSError) as error:
            self.send("error", str(error))
        else:
            self.send("ok")


def _interrupt(thread: threading.Thread) -> None:
    """Signals until the thread has seen its stop flag: one signal can fall between its look at the
    flag and its read."""
    while thread.is_alive():
        signal.pthread_kill(thread.ident, INTERRUPT)
        thread.join(0.005)


def main(conn: Connection, name: str, index: int) -> None:
    """Entry of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the coordinator's to handle
    signal.signal(INTERRUPT, lambda *_: None)
    try:
        worker = Worker(conn, name, index)
    except (ShardedPcError, OSError) as error:
        conn.send(("error", str(error)))
        return
    worker.send("ok")
    try:
        while True:
            word, *arguments = conn.recv()
            if word == "stop":
                break
            worker.obey(word, tuple(arguments))
    except (EOFError, ConnectionResetError):
        pass  # the coordinator is gone: guests wait for its successor
    worker.stop()
    worker.send("ok")
