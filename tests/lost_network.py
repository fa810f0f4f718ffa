"""A network that goes away: a program for tests, in a network namespace of its own.

    python -m tests.lost_network NAME PHASE

A receiver and its source talk TCP over the namespace's loopback, which goes down in PHASE.  Prints
one JSON object: how the receiver ended, or that namespaces are not permitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
import threading

from sharded_pc.address import TcpAddress
from sharded_pc.coordinator import Coordinator, Settings
from sharded_pc.errors import ShardedPcError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.state import MigrationStatus
from sharded_pc.transport import liveness
from tests.qemu import wait_until
from tests.synthetic import WAIT_S, StepSource, missing_pages

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
PHASES = ("set-up", "precopy", "postcopy", "postcopy, asking")


def enter_namespace() -> None:
    """OSError where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def set_loopback(*, up: bool) -> None:
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP if up else 0))


def shorten_limits() -> None:
    liveness.KEEP_IDLE_SECONDS = liveness.KEEP_INTERVAL_SECONDS = 1
    liveness.KEEP_COUNT = 2
    liveness.USER_TIMEOUT_SECONDS = 2


def go_as_far_as(phase: str, source: StepSource) -> None:
    source.set_up()
    wait_until(lambda: 1 in source.back.pongs, "the receiver to follow", WAIT_S)
    if phase == "set-up":
        return
    source.precopy()
    if phase != "precopy":
        source.switch()
        source.wait_switched()


class Migration:
    def __init__(self, name: str, phase: str) -> None:
        self._phase = phase
        self._settings = Settings(incoming=TcpAddress("127.0.0.1", 0), name=name, workers=1)
        self._coordinator: Coordinator
        self._source: threading.Thread

    async def run(self) -> ShardedPcError | None:
        """How the receiver ended."""
        async with Coordinator(self._settings, self._begin) as self._coordinator:
            giving_up = asyncio.create_task(self._give_up())
            try:
                await self._coordinator.receive()
            except ShardedPcError as error:
                return error
            finally:
                giving_up.cancel()
        return None

    async def _give_up(self) -> None:
        """As soon as it is paused."""
        while self._coordinator.memory.control.status is not MigrationStatus.POSTCOPY_PAUSED:
            await asyncio.sleep(0.01)
        self._coordinator.quit()

    def _begin(self, where: TcpAddress) -> None:
        self._source = threading.Thread(target=self._migrate, args=(where,), daemon=True)
        self._source.start()

    def _migrate(self, where: TcpAddress) -> None:
        source = StepSource(socket.create_connection((where.host, where.port)))
        go_as_far_as(self._phase, source)
        set_loopback(up=False)
        if self._phase == "postcopy, asking":
            missing = missing_pages(source.oracle, 0)
            memory = self._coordinator.memory
            memory.requested.set(memory.control.block(0)[2] + missing[0], 1)
            self._coordinator.migration.connections.ask_again()
        with contextlib.suppress(OSError):
            source._sock.recv(PAGE_BYTES)  # holds the connection, as a host that froze does


def main(name: str, phase: str) -> None:
    try:
        enter_namespace()
    except OSError as error:
        print(json.dumps({"n/a": error.strerror}))
        return
    set_loopback(up=True)
    shorten_limits()
    error = asyncio.run(Migration(name, phase).run())
    print(json.dumps({"error": str(error), "exit": getattr(error, "exit_code", 0)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
