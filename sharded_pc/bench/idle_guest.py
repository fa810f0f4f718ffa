"""A guest process for throughput: it maps and registers the RAM and does not touch it."""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Connection

from sharded_pc import processes
from sharded_pc.errors import AttachError, GuestLost, ShardedPcError

GUEST_SECONDS = 60.0


def _guest(conn: Connection) -> None:
    """The process: an attach socket's path is answered by "attached", then by "released"."""
    while (path := conn.recv()) is not None:
        try:
            _attend(conn, path)
        except (OSError, ShardedPcError) as error:
            conn.send(f"the benchmark's guest: {error}")


def _attend(conn: Connection, path: str) -> None:
    import sharded_pc

    with sharded_pc.attach(path, timeout=GUEST_SECONDS, wait_ready=False) as guest:
        conn.send("attached")
        with contextlib.suppress(AttachError):  # the receiver tells why it failed
            guest.wait(GUEST_SECONDS)
    conn.send("released")


class IdleGuest:
    """A process that maps and registers the RAM and leaves it alone; the parent's end."""

    def __init__(self) -> None:
        self._process, self._conn = processes.start(_guest, name="bench-guest", daemon=True)

    def __enter__(self) -> IdleGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._conn.close()

    def begin(self, path: str) -> None:
        """Attaches as soon as the receiver knows its blocks."""
        self._conn.send(path)

    def wait(self, word: str) -> None:
        """For "attached", or "released" in the end; GuestLost."""
        try:
            while (answer := self._conn.recv() if self._conn.poll(GUEST_SECONDS) else None) != word:
                if answer not in ("attached", "released"):
                    raise GuestLost(str(answer or f"the benchmark's guest is not {word}"))
        except (EOFError, ConnectionResetError):
            raise GuestLost("the benchmark's guest died") from None
