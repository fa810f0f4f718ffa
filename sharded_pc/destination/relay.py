"""The receiver's end of the relay in QEMU (attach/monitor/relay.h), which stands between a monitor
and who manages that QEMU: frames on a Unix socket.

`command(message)` answers what is the migration's, in order; what it raises as QmpError is an error
reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import struct
import time
from collections.abc import Awaitable, Callable

from sharded_pc.errors import QmpError
from sharded_pc.transport.accepting import TrustedAcceptor
from sharded_pc.transport.incoming import bind_unix

log = logging.getLogger(__name__)

FRAME = struct.Struct("=II")
"""kind and length, as struct sp_frame"""
COMMAND, LEFT = ord("C"), ord("L")
ANSWER, EVENT, OVER = ord("A"), ord("E"), ord("O")
PING = ord("P")

ANSWERED_SECONDS = 2.0
"""For a living relay to say that a client has all that it was sent."""
LEAVE_SECONDS = 30.0
"""For it to leave: a command may be under way at QEMU."""


class Relay:
    """Serves one QEMU's relay, whenever it connects."""

    def __init__(self, path: str, command: Callable[[dict], Awaitable[object]]) -> None:
        self.path = path
        self._command = command
        self._sock = bind_unix(path)
        self._writer: asyncio.StreamWriter | None = None
        self._unsent: list[bytes] = []
        """before it has connected"""
        self._pongs: list[asyncio.Future[None]] = []
        self._left = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        acceptor = TrustedAcceptor(self._sock)
        while True:
            reader, writer = await acceptor.accept_streams()
            self._writer = writer
            for frame in self._unsent:
                writer.write(frame)
            self._unsent.clear()
            try:
                await self._talk(reader)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                log.debug("the relay is gone: %s", error)
            finally:
                self._writer = None
                writer.transport.abort()
                self._answer_pings()

    async def _talk(self, reader: asyncio.StreamReader) -> None:
        while True:
            kind, size = FRAME.unpack(await reader.readexactly(FRAME.size))
            data = await reader.readexactly(size)
            if kind == COMMAND:
                self._send(ANSWER, await self._reply(data))
            elif kind == PING:
                self._answer_pings(1)
            elif kind == LEFT and not self._left.done():
                self._left.set_result(None)

    async def _reply(self, data: bytes) -> bytes:
        reply: dict = {}
        try:
            message = json.loads(data)
            if "id" in message:
                reply["id"] = message["id"]
            answer = await self._command(message)
            reply["return"] = {} if answer is None else answer
        except ValueError as error:
            reply["error"] = {"class": "GenericError", "desc": f"JSON parse error, {error}"}
        except QmpError as error:
            reply["error"] = {"class": error.kind, "desc": str(error)}
        except Exception as error:  # who asks waits for ever for an answer
            log.exception("a command at QEMU's monitor failed")
            reply["error"] = {"class": "GenericError", "desc": f"the receiver failed: {error!r}"}
        return json.dumps(reply).encode()

    def _send(self, kind: int, data: bytes = b"") -> None:
        frame = FRAME.pack(kind, len(data)) + data
        if self._writer is not None:
            self._writer.write(frame)
        elif kind != ANSWER:  # who has asked is gone
            self._unsent.append(frame)

    def event(self, name: str, data: dict) -> None:
        """For a client that has negotiated."""
        microseconds = time.time_ns() // 1000
        stamp = {"seconds": microseconds // 1_000_000, "microseconds": microseconds % 1_000_000}
        self._send(EVENT, json.dumps({"timestamp": stamp, "event": name, "data": data}).encode())

    @property
    def connected(self) -> bool:
        return self._writer is not None

    async def flush(self) -> None:
        """What was said is with the client, or there is none."""
        if self._writer is None:
            return
        pong = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        self._send(PING)
        await asyncio.wait({pong}, timeout=ANSWERED_SECONDS)

    def _answer_pings(self, most: int | None = None) -> None:
        for pong in self._pongs[:most]:
            pong.set_result(None)
        del self._pongs[:most]

    async def leave(self, gone: Awaitable[object]) -> None:
        """Nobody stands between the monitor and its client any more; or `gone` (QEMU) is."""
        self._send(OVER)
        over = asyncio.ensure_future(gone)
        try:
            done, _ = await asyncio.wait(
                {self._left, over}, timeout=LEAVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                log.warning("the monitor's relay has not left yet; it does as soon as it can")
        finally:
            over.cancel()
            await asyncio.gather(over, return_exceptions=True)

    async def close(self) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._sock.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
