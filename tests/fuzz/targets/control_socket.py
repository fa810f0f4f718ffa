"""The control socket: every message of a client gets an answer that is JSON, and that is all."""

from __future__ import annotations

import json

from sharded_pc.errors import HostError
from sharded_pc.observe.qmp import Command, QmpServer

TOKENS = (
    b'{"execute":"qmp_capabilities"}',
    b'{"execute":"query-migrate","id":1}',
    b'"id":',
    b'"arguments":{}',
    b'{"execute":"migrate-recover","arguments":{"uri":"tcp:a:1"}}',
    b"null",
    b"NaN",
    b"[",
    b"]",
    b'{"execute":"query-commands"}',
)


class _Reader:
    """What a client has sent, as an asyncio.StreamReader has it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, most: int) -> bytes:
        piece, self._data = self._data[:most], self._data[most:]
        return piece


class _Client:
    def __init__(self) -> None:
        self.negotiated = False
        self.sent: list[dict] = []

    def send(self, message: dict) -> None:
        self.sent.append(_strict(json.dumps(message)))

    async def drain(self) -> None:
        pass


class _Server(QmpServer):
    """Without a socket."""

    def __init__(self) -> None:
        commands = (
            Command("query-commands", lambda: [{"name": name} for name in self._names()]),
            Command("query-migrate", lambda: {"status": "active"}),
            Command("migrate-recover", _recover, {"uri": str}),
            Command("quit", lambda: None),
        )
        self._commands = {command.name: command for command in commands}


def _recover(uri: str) -> None:
    raise HostError(f"nobody is at {uri}")


def _strict(text: str) -> dict:
    return json.loads(text, parse_constant=_no_json)


def _no_json(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def one_input(data: bytes) -> None:
    client = _Client()
    talk = _Server()._talk(client, _Reader(data))
    try:
        talk.send(None)
    except StopIteration:
        pass
    else:
        raise AssertionError("it waits for something")
    greeting, *answers = client.sent
    assert "QMP" in greeting
    assert all(("return" in answer) != ("error" in answer) for answer in answers)
