"""The synthetic stream (wire/resume.py) on its way into a destination QEMU.

Blocking: called on threads of their own.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from sharded_pc.errors import HostError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.memory import GuestMemory
from sharded_pc.native.records import block_records
from sharded_pc.wire import resume

log = logging.getLogger(__name__)

CHUNK_PAGES = 256
LOOK_SECONDS = 0.0002


class ResumeStream:
    """One stream: everything up to the end of RAM, then the devices; `private` are the blocks that
    QEMU keeps in memory of its own, with their index.  HostError."""

    def __init__(self, path: Path, memory: GuestMemory, timeout: float) -> None:
        self._memory = memory
        self._timeout = timeout
        try:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise HostError(f"make a socket: {error.strerror}") from error
        self._sock.settimeout(timeout)
        self._path = str(path)

    def send_ram(
        self,
        machine: str,
        blocks: Sequence[tuple[RamBlock, int]],
        private: Sequence[tuple[int, RamBlock]],
    ) -> None:
        """Returns when QEMU has read it all, so that it waits for the devices."""
        try:
            self._sock.connect(self._path)
            self._sock.sendall(resume.head(machine, blocks))
            for index, block in private:
                self._send_block(index, block)
            self._sock.sendall(resume.end_of_ram())
            self._wait_read()
        except OSError as error:
            self._closed(error)

    def send_devices(self, devices: bytes) -> None:
        try:
            self._sock.sendall(resume.tail(devices))
        except OSError as error:
            self._closed(error)

    def close(self) -> None:
        self._sock.close()

    def _closed(self, error: OSError) -> None:
        """QEMU has closed the stream: its monitor says why."""
        log.debug("the destination closed its stream: %s", error)

    def _send_block(self, index: int, block: RamBlock) -> None:
        """Reads by descriptor: our mapping is in no userfaultfd, but holes stay holes."""
        fd, step = self._memory.blocks[index].fd, CHUNK_PAGES * PAGE_BYTES
        for offset in range(0, block.size, step):
            content = os.pread(fd, min(step, block.size - offset), offset)
            self._sock.sendall(block_records(block.name, offset // PAGE_BYTES, content))

    def _wait_read(self) -> None:
        """A Unix socket counts what its peer has not read (SIOCOUTQ); nothing wakes for it."""
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            (unread,) = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)))
            if not unread:
                return
            time.sleep(LOOK_SECONDS)
