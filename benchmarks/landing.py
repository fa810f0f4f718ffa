"""What the copy would spare that a channel of multifd makes between its socket and the RAM.

    python -m benchmarks.landing [--repeat 5] [--size 256] [--json]

A sender process writes pages into a Unix socket; a receiver takes them 128 KiB at a time, as
native/multifd/loop.c does: into a buffer and by pwrite into shared memory (`buffer`), or straight
into a mapping of it (`mapping`).  The memory is in one of three states:

absent     nothing is allocated: the first page ever that comes there
present    allocated, and mapped by somebody else: in a worker, what the coordinator has populated
mapped     allocated, and in the page tables of the receiver too

What is told is CPU seconds per GiB of the receiver's thread, which suffers less from who else runs
here than its time; all alternate.  What it costs to have the RAM mapped in the receiver, too
(MADV_POPULATE_WRITE over pages that are there), is the last row.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import socket
import statistics
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from sharded_pc import processes

CHUNK_BYTES = 128 << 10
GIB = 1 << 30
MADV_POPULATE_WRITE = 23
STATES = ("absent", "present", "mapped")


def send(conn: Connection, size: int) -> None:
    """The sender's process: as much as is asked for, into the socket that it is given."""
    page = os.urandom(CHUNK_BYTES)
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        while sock.recv(1):
            for _ in range(size // CHUNK_BYTES):
                sock.sendall(page)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_utime + used.ru_stime


def by_buffer(sock: socket.socket, fd: int, ram: mmap.mmap) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for at in range(0, len(ram), CHUNK_BYTES):
        sock.recv_into(buffer, CHUNK_BYTES, socket.MSG_WAITALL)
        os.pwrite(fd, buffer, at)


def by_mapping(sock: socket.socket, fd: int, ram: mmap.mmap) -> None:
    with memoryview(ram) as view:
        for at in range(0, len(ram), CHUNK_BYTES):
            with view[at : at + CHUNK_BYTES] as chunk:
                sock.recv_into(chunk, CHUNK_BYTES, socket.MSG_WAITALL)


def measured(size: int, work: Callable[..., object], *arguments: object) -> float:
    """CPU seconds per GiB."""
    before = cpu_seconds()
    work(*arguments)
    return (cpu_seconds() - before) * GIB / size


class Memory:
    """Shared memory in one of the states, and the receiver's mapping."""

    def __init__(self, size: int, state: str) -> None:
        self.fd = os.memfd_create("landing")
        os.ftruncate(self.fd, size)
        if state != "absent":
            with mmap.mmap(self.fd, size) as other:
                other.madvise(MADV_POPULATE_WRITE)
        self.ram = mmap.mmap(self.fd, size)
        if state == "mapped":
            self.ram.madvise(MADV_POPULATE_WRITE)

    def close(self) -> None:
        self.ram.close()
        os.close(self.fd)


def run(size: int, repeat: int) -> dict[str, list[float]]:
    process, conn = processes.start(send, size, name="landing-sender", daemon=True)
    found: dict[str, list[float]] = {}
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        for turn in range(-1, repeat):  # the first one touches all memory, and does not count
            for name, figure in _round(sock, size):
                found.setdefault(name, []).extend([figure] if turn >= 0 else [])
    conn.close()
    process.join()
    return found


def _round(sock: socket.socket, size: int) -> Iterator[tuple[str, float]]:
    for state in STATES:
        for name, receive in (("buffer", by_buffer), ("mapping", by_mapping)):
            memory = Memory(size, state)
            sock.sendall(b"!")
            yield f"{state}, {name}", measured(size, receive, sock, memory.fd, memory.ram)
            memory.close()
    memory = Memory(size, "present")
    yield "to map it", measured(size, memory.ram.madvise, MADV_POPULATE_WRITE)
    memory.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, metavar="MIB")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = run(args.size << 20, args.repeat)
    if args.json:
        print(json.dumps({"size": args.size << 20, "cpu-seconds-per-gib": found}))
        return
    print(f"CPU seconds per GiB of the receiver, {args.size} MiB, {args.repeat} repeats in turns")
    for name, each in found.items():
        print(f"{name:18} {statistics.median(each):6.3f} ({min(each):.3f}..{max(each):.3f})")


if __name__ == "__main__":
    main()
