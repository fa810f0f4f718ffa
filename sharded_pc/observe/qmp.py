"""The control socket: as much QMP as a migration's receiver needs (docs/interop/qmp-spec.rst).

Greeting, `qmp_capabilities`, `query-migrate`, `query-commands`, `query-version`, and what the
receiver gives it; `MIGRATION` events.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping

from sharded_pc.errors import QmpError, ShardedPcError
from sharded_pc.transport.accepting import TrustedAcceptor
from sharded_pc.transport.incoming import bind_unix
from sharded_pc.transport.json_stream import JsonSplitter

log = logging.getLogger(__name__)

VERSION = {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "sharded_pc"}

MAX_CLIENTS = 32
"""At a time, so that they cannot take all descriptors; who is silent makes room for others."""
MAX_UNREAD_BYTES = 1 << 20
FLUSH_SECONDS = 1.0
"""What a client that is done with may still read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """One that the receiver answers; `parameters` are all mandatory, by name and type.  Its answer
    is `{}` if `run` gives none; ShardedPcError becomes an error reply."""

    name: str
    run: Callable[..., object]
    parameters: Mapping[str, type] = dataclasses.field(default_factory=dict)


class _Client:
    """One connection; it is `negotiated` after qmp_capabilities and gets events from then on."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.negotiated = False
        self.heard = time.monotonic()
        """when it connected, or said something"""

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

    async def finish(self) -> None:
        """Closes when the client has read what it was sent, for which it has a moment."""
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), FLUSH_SECONDS)

    def abort(self) -> None:
        """Closes now: nobody waits for one who does not read."""
        self._writer.transport.abort()


class QmpServer:
    """Answers `commands`, and some that every QMP server has."""

    def __init__(self, path: str, commands: Iterable[Command]) -> None:
        self.path = path
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task] = set()
        own = (
            Command("query-version", lambda: VERSION),
            Command("query-commands", lambda: [{"name": name} for name in self._names()]),
        )
        self._commands = {command.name: command for command in (*own, *commands)}
        self._sock = bind_unix(path)
        self._accepting: asyncio.Task | None = None

    def _names(self) -> list[str]:
        return sorted([*self._commands, "qmp_capabilities"])

    async def start(self) -> None:
        self._accepting = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        acceptor = TrustedAcceptor(self._sock)
        while True:
            reader, writer = await acceptor.accept_streams()
            self._make_room()
            client = _Client(writer)
            self._clients.add(client)
            task = asyncio.create_task(self._serve(client, reader))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _make_room(self) -> None:
        """Whoever comes gets in: he may be the one who has to recover a paused migration."""
        if len(self._clients) >= MAX_CLIENTS:
            silent = min(self._clients, key=lambda client: (client.negotiated, client.heard))
            self._clients.discard(silent)
            silent.abort()
            log.warning(
                "control client dropped: %d are connected, and it was silent for the longest time",
                MAX_CLIENTS,
            )

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
        tasks = [*self._tasks, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        for client in self._clients:
            client.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    async def _serve(self, client: _Client, reader: asyncio.StreamReader) -> None:
        try:
            await self._talk(client, reader)
            await client.finish()
        except ConnectionError:
            pass
        finally:
            self._clients.discard(client)
            client.abort()

    async def _talk(self, client: _Client, reader: asyncio.StreamReader) -> None:
        client.send({"QMP": {"version": VERSION, "capabilities": []}})
        splitter = JsonSplitter()
        while data := await reader.read(4096):
            client.heard = time.monotonic()
            splitter.feed(data)
            while True:
                try:
                    message = splitter.take()
                except ValueError as error:
                    client.send({"error": {"class": "GenericError", "desc": str(error)}})
                    return
                if message is None:
                    break
                client.send(self._answer(client, message))
                await client.drain()

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
        return _run(self._commands[command], message.get("arguments", {}))


def _run(command: Command, arguments: object) -> object:
    """QEMU's words for arguments that do not fit (qapi/qobject-input-visitor.c)."""
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    for name in arguments:
        if name not in command.parameters:
            raise QmpError(f"Parameter '{name}' is unexpected")
    for name, kind in command.parameters.items():
        if name not in arguments:
            raise QmpError(f"Parameter '{name}' is missing")
        if not isinstance(arguments[name], kind):
            raise QmpError(f"Invalid parameter type for '{name}', expected: {_KINDS[kind]}")
    try:
        answer = command.run(**arguments)
    except ShardedPcError as error:
        raise QmpError(str(error)) from None
    return {} if answer is None else answer


_KINDS = {str: "string"}
"""QEMU's names of types in error texts."""
