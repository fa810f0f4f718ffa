"""Who connects where a source is awaited, which of them is the source, and what its channels are.

Anybody can connect: a source, a further channel of it, a port scan, a forgotten netcat.  What they
say first tells them apart (channels.py); it is peeked at, so that who reads on meets it again.

Three steps for each: it is accepted, it is looked at (`_look`), it is judged by its first bytes
(`_judge`).  Further channels count only if they come from where the source does.  Who says nothing
yet and comes from there may be the channel of postcopy-preempt, and may take its time; anybody else
is a stranger: closed with a line in the log, and forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from sharded_pc.errors import HostError
from sharded_pc.transport.accepting import Acceptor
from sharded_pc.transport.channels import (
    MOST_BYTES,
    RECOVERY,
    SOURCE,
    Channel,
    Kind,
    kind_of,
    may_go_on,
)
from sharded_pc.transport.fds import readable
from sharded_pc.transport.peers import origin_of

log = logging.getLogger(__name__)

CANDIDATE_SECONDS = 30.0
"""How long one may take to say who it is.  A source without a return path says nothing before its
dirty bitmaps are set up, which takes a big guest some seconds."""
LOOK_AGAIN_SECONDS = 0.02
"""Between two looks at half a magic, which keeps the socket readable."""
MAX_CANDIDATES = 128
"""At a time; more wait in the queue, so that strangers cannot take all descriptors."""
TLS = b"\x16\x03"
"""A handshake's first record (RFC 8446, 5.1)."""
TLS_UNASKED = (
    "it speaks TLS: start this receiver with --tls-creds or --tls-psk, or take tls-creds away at "
    "the source"
)


class Candidates:
    """Everybody who connects to one listening socket, which is closed with it.

    `source()` finds the source; from then on `channel()` gives its further channels, one by one,
    each with its kind, until close() lets everybody else go.
    """

    def __init__(
        self, sock: socket.socket, wanted: bytes = SOURCE, acceptor: Acceptor | None = None
    ) -> None:
        """`wanted`: what the source says first, SOURCE or RECOVERY.  `acceptor`: takes them off
        `sock` otherwise than as they come (TLS)."""
        self._sock = sock
        self._wanted = wanted
        self._acceptor = acceptor or Acceptor(sock)
        self._room = asyncio.Semaphore(MAX_CANDIDATES)
        self._looking: dict[socket.socket, asyncio.Task] = {}
        self._accepting: asyncio.Task | None = None
        self._found: asyncio.Future[Channel]
        self._peer = ""
        self._taken: set[socket.socket] = set()
        """not ours to close any more"""
        self._further: asyncio.Queue[Channel] = asyncio.Queue()
        self._early: list[Channel] = []
        """of multifd, which came before the main channel"""

    async def source(self) -> Channel:
        """The main channel.  Called once.  HostError."""
        self._found = asyncio.get_running_loop().create_future()
        self._accepting = asyncio.create_task(self._accept())
        self._accepting.add_done_callback(lambda _: self._sock.close())
        return await self._found

    async def channel(self) -> Channel:
        """The next further channel of the source that has said what it is."""
        return await self._further.get()

    def settle(self) -> bool:
        """Strangers who say nothing are told of and let go.  Whether a connection from where the
        source is may yet turn out to be a channel of it."""
        with contextlib.suppress(OSError):
            while (sock := self._acceptor.take()) is not None:
                self._look_at(sock)
        unknown = [sock for sock in self._looking if sock not in self._taken and _is_open(sock)]
        for sock in unknown:
            if origin_of(sock) != self._peer and not _has_spoken(sock):
                self._tell(origin_of(sock), "it said nothing")
                self._looking[sock].cancel()
        own = any(origin_of(sock) == self._peer for sock in unknown)
        is_coming = self._peer in self._acceptor.on_the_way
        return own or is_coming or not self._further.empty()

    def close(self) -> None:
        """Each task closes its own socket, behind its last look at it."""
        self._acceptor.close()
        for task in self._looking.values():
            task.cancel()
        while not self._further.empty():
            self._further.get_nowait().sock.close()
        for channel in self._early:
            channel.sock.close()
        self._early.clear()
        if self._accepting is None:
            self._sock.close()
        else:
            self._accepting.cancel()

    async def _accept(self) -> None:
        try:
            while True:
                await self._room.acquire()
                self._look_at(await self._acceptor.accept())
        except OSError as error:
            if not self._found.done():
                self._found.set_exception(HostError(f"take a connection: {error.strerror}"))

    def _look_at(self, sock: socket.socket) -> None:
        task = asyncio.create_task(self._look(sock, origin_of(sock)))
        self._looking[sock] = task
        task.add_done_callback(lambda _: self._let_go(sock))

    def _let_go(self, sock: socket.socket) -> None:
        del self._looking[sock]
        self._room.release()
        if sock not in self._taken:
            sock.close()

    async def _look(self, sock: socket.socket, peer: str) -> None:
        try:
            self._judge(sock, peer, await self._first_bytes(sock, peer))
        except TimeoutError:
            self._tell(peer, f"it did not say for {CANDIDATE_SECONDS:g} s that it is a source")
        except OSError as error:
            self._tell(peer, error.strerror)

    async def _first_bytes(self, sock: socket.socket, peer: str) -> bytes:
        """TimeoutError, but not for who may be the source's silent channel."""
        try:
            return await asyncio.wait_for(_opening(sock), CANDIDATE_SECONDS)
        except TimeoutError:
            if peer != self._peer:
                raise
            return await _opening(sock)

    def _judge(self, sock: socket.socket, peer: str, opening: bytes) -> None:
        kind = kind_of(opening, self._wanted)
        is_found = self._found.done()
        if kind is Kind.MAIN and not is_found:
            self._peer = peer
            self._found.set_result(self._take(kind, sock, peer))
            self._sort_early()
        elif kind is Kind.MULTIFD and self._wanted == SOURCE and self._peer in ("", peer):
            self._multifd(self._take(kind, sock, peer))
        elif kind is Kind.PREEMPT and is_found and self._peer == peer:
            self._further.put_nowait(self._take(kind, sock, peer))
        else:
            self._tell(peer, _describe(opening, awaits_new=self._wanted == SOURCE))

    def _take(self, kind: Kind, sock: socket.socket, peer: str) -> Channel:
        self._taken.add(sock)
        return Channel(kind, sock, peer)

    def _multifd(self, channel: Channel) -> None:
        """It may come before the source's main channel."""
        if self._found.done():
            self._further.put_nowait(channel)
        elif len(self._early) < MAX_CANDIDATES:
            self._early.append(channel)
        else:
            channel.sock.close()

    def _sort_early(self) -> None:
        """Only the source's own."""
        for channel in self._early:
            if channel.peer == self._peer:
                self._further.put_nowait(channel)
            else:
                channel.sock.close()
                self._tell(channel.peer, "a channel of multifd, and no source came from there")
        self._early.clear()

    def _tell(self, peer: str, why: str) -> None:
        log.warning("connection from %s closed: %s", peer, why)


async def _opening(sock: socket.socket) -> bytes:
    """What a peer says first, as far as it is needed to know it; b"" if it closes."""
    while True:
        await readable(sock)
        with contextlib.suppress(BlockingIOError):
            seen = sock.recv(MOST_BYTES, socket.MSG_PEEK)
            if not seen or not may_go_on(seen):
                return seen
            await asyncio.sleep(LOOK_AGAIN_SECONDS)


def _is_open(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _has_spoken(sock: socket.socket) -> bool:
    """Of an open one."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def _describe(opening: bytes, *, awaits_new: bool) -> str:
    if not opening:
        return "it closed without a word"
    if opening == SOURCE and awaits_new:
        return "a second source while the first migrates"
    if opening == SOURCE:
        return "it begins a new migration where a paused one is to be recovered"
    if opening.startswith(RECOVERY):
        return "it recovers a migration, and none is paused here"
    if opening.startswith(TLS):
        return TLS_UNASKED
    return f"it is no source, it begins with {opening.hex(' ')}"
