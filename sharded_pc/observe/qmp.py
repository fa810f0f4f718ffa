"""The control socket: as much QMP as a migration's receiver needs (docs/interop/qmp-spec.rst).

Greeting, `qmp_capabilities`, `query-migrate`, `query-commands`, `query-version`, `quit`, and
`MIGRATION` events.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable

from sharded_pc.transport.incoming import bind_unix
from sharded_pc.transport.json_stream import JsonSplitter

VERSION = {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "sharded_pc"}


MAX_UNREAD_BYTES = 1 << 20


class QmpError(Exception):
    """An error reply: QMP's class and a text."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


class _Client:
    """One connection; it is `negotiated` after qmp_capabilities and gets events from then on."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.negotiated = False

    def send(self, message: dict) -> None:
        """Queues a message; a client that reads nothing is let go."""
        if self._writer.is_closing():
            return
        self._writer.write(json.dumps(message).encode() + b"\r\n")
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self._writer.transport.abort()

    async def drain(self) -> None:
        """Waits until the client has read most of what it was sent."""
        await self._writer.drain()


class QmpServer:
    """`query` gives query-migrate's answer, `quit` ends the receiver."""

    def __init__(self, path: str, query: Callable[[], dict], quit_: Callable[[], None]) -> None:
        self.path = path
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task] = set()
        self._commands: dict[str, Callable[[], object]] = {
            "query-migrate": query,
            "query-version": lambda: VERSION,
            "query-commands": lambda: [{"name": name} for name in self._names()],
            "quit": lambda: quit_() or {},
        }
        self._sock = bind_unix(path)
        self._server: asyncio.Server | None = None

    def _names(self) -> list[str]:
        return sorted([*self._commands, "qmp_capabilities"])

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, sock=self._sock)

    def event(self, name: str, data: dict) -> None:
        """Sends an event to everybody who has negotiated."""
        microseconds = time.time_ns() // 1000
        stamp = {"seconds": microseconds // 1_000_000, "microseconds": microseconds % 1_000_000}
        for client in self._clients:
            if client.negotiated:
                client.send({"event": name, "data": data, "timestamp": stamp})

    async def idle(self, timeout: float) -> None:
        """Returns when nobody is connected any more, or after `timeout` seconds: whoever watches
        the migration can ask how it ended."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        else:
            self._sock.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        client = _Client(writer)
        self._tasks.add(task)
        self._clients.add(client)
        try:
            await self._talk(client, reader)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._clients.discard(client)
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _talk(self, client: _Client, reader: asyncio.StreamReader) -> None:
        client.send({"QMP": {"version": VERSION, "capabilities": []}})
        splitter = JsonSplitter()
        while data := await reader.read(4096):
            splitter.feed(data)
            try:
                while (message := splitter.take()) is not None:
                    client.send(self._answer(client, message))
                    await client.drain()
            except ValueError as error:
                client.send({"error": {"class": "GenericError", "desc": str(error)}})
                return

    def _answer(self, client: _Client, message: object) -> dict:
        reply: dict = {}
        if isinstance(message, dict) and "id" in message:
            reply["id"] = message["id"]
        try:
            reply["return"] = self._execute(client, message)
        except QmpError as error:
            reply["error"] = {"class": error.kind, "desc": str(error)}
        return reply

    def _execute(self, client: _Client, message: object) -> object:
        if not isinstance(message, dict) or not isinstance(message.get("execute"), str):
            raise QmpError("QMP input must be an object with an 'execute' member")
        command = message["execute"]
        if command == "qmp_capabilities" and not client.negotiated:
            client.negotiated = True
            return {}
        if not client.negotiated:
            raise QmpError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if command not in self._commands:
            raise QmpError(f"The command {command} has not been found", "CommandNotFound")
        return self._commands[command]()
