"""JSON messages with descriptors over a Unix stream socket (SCM_RIGHTS).

Not socket.recv_fds: it ignores its flags, so that the descriptors would be inheritable.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Sequence

from sharded_pc.errors import AttachError
from sharded_pc.transport.json_stream import JsonSplitter

READ_BYTES = 1 << 16
MAX_FDS = 253
"""SCM_MAX_FD, the kernel's limit for one message."""


def encode(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


def send(sock: socket.socket, message: object, fds: Sequence[int] = ()) -> None:
    """One message with up to 253 descriptors, which stay the sender's."""
    data = encode(message)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = sock.sendmsg([data], rights)
    if sent < len(data):
        sock.sendall(data[sent:])


class Inbox:
    """Cuts a byte stream into JSON values and collects the descriptors that come along."""

    def __init__(self) -> None:
        self._splitter = JsonSplitter()
        self.fds: list[int] = []

    def receive(self, sock: socket.socket) -> bool:
        """Reads once; false at the end of the stream.  BlockingIOError on an empty non-blocking
        socket; AttachError if more descriptors come than this process can take."""
        space = socket.CMSG_SPACE(MAX_FDS * 4)
        data, ancillary, flags, _ = sock.recvmsg(READ_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self.fds += array.array("i", raw[: len(raw) // 4 * 4])
        if flags & socket.MSG_CTRUNC or len(self.fds) > MAX_FDS:
            raise AttachError("a message brought more descriptors than this process can take")
        self._splitter.feed(data)
        return bool(data)

    def take(self) -> object | None:
        """The next complete JSON value, None if there is none yet; AttachError on rubbish."""
        try:
            return self._splitter.take()
        except ValueError as error:
            raise AttachError(str(error)) from None

    def take_fds(self) -> list[int]:
        """All descriptors so far; they become the caller's."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)


def receive_message(sock: socket.socket, inbox: Inbox) -> object | None:
    """Blocks for one message (the socket's timeout applies); None at the end of the stream."""
    while (message := inbox.take()) is None:
        if not inbox.receive(sock):
            return None
    return message


async def readable(sock: socket.socket) -> None:
    """Returns when the non-blocking socket can be read."""
    import asyncio  # workers and guests, which have no loop, start a third faster without

    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def receive_message_async(sock: socket.socket, inbox: Inbox) -> object | None:
    """As receive_message, for a non-blocking socket in an event loop."""
    while (message := inbox.take()) is None:
        await readable(sock)
        if not inbox.receive(sock):
            return None
    return message
