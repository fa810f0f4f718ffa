"""Aliases of a guest's RAM, and threads that populate them ahead of the stream (`continue`)."""

from __future__ import annotations

import logging
import threading

from sharded_pc import threads
from sharded_pc.errors import HostError
from sharded_pc.memory import GuestMemory
from sharded_pc.native.alias import Alias
from sharded_pc.native.core import ffi

log = logging.getLogger(__name__)


class Populator:
    """The receiver's own mappings of all blocks, `aliases`, in the blocks' order; one thread for
    each shard populates its stripes at a low priority.  Running out of memory or
    threads ends that quietly: what is not populated is allocated as it arrives."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._stop = ffi.new("uint32_t *", 0)
        self.aliases: list[Alias] = []
        self._threads: list[threading.Thread] = []
        self._pages: list[int] = []

    def start(self) -> None:
        """After the memory's geometry is known; HostError if there are no addresses."""
        geometry = self._memory.geometry
        assert geometry is not None
        for block in self._memory.blocks:
            self.aliases.append(Alias(block.fd, block.size))
        self._pages = [0] * geometry.shards
        for shard in range(geometry.shards):
            thread = threading.Thread(
                target=self._populate, args=(shard,), name=f"populate-{shard}"
            )
            try:
                threads.start(thread)
            except HostError as error:
                log.warning("pages are not populated ahead: %s", error)
                return
            self._threads.append(thread)

    def _populate(self, shard: int) -> None:
        memory = self._memory
        for index, alias in enumerate(self.aliases):
            pages, why = alias.populate(memory.control, memory.received, index, shard, self._stop)
            self._pages[shard] += pages
            if why is not None:
                log.info("populating shard %d ended: %s", shard, why)
                return

    @property
    def pages(self) -> int:
        """Populated so far by threads that are done with a block."""
        return sum(self._pages)

    def join(self) -> None:
        """Returns when everything is populated that can be."""
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Ends the threads and unmaps; nobody may use the aliases any more."""
        self._stop[0] = 1
        self.join()
        while self.aliases:
            self.aliases.pop().close()
