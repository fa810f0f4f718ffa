"""Our connection to a destination's monitor, with a labelled fake for QEMU's end."""

from __future__ import annotations

import asyncio
import json

from qemu.qmp import QMPClient, Runstate

from sharded_pc.destination.monitor import Monitor

GREETING = {"QMP": {"version": {}, "capabilities": []}}


class FakeQemu:
    """Closes its first connections as soon as they are made, as a QEMU that is about to be one."""

    def __init__(self, closes: int) -> None:
        self.closes, self.connections = closes, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._say(writer, GREETING)
        while sent := await reader.read(4096):
            asked = json.loads(sent)
            self._say(writer, {"return": {}} | {key: asked[key] for key in asked if key == "id"})
            if self.connections <= self.closes:
                break
        writer.close()

    @staticmethod
    def _say(writer: asyncio.StreamWriter, message: dict) -> None:
        writer.write(json.dumps(message).encode() + b"\r\n")


def test_closed_as_it_was_made(tmp_path, monkeypatch):
    """The library asserts that a connection is still there when it has been made."""
    made = QMPClient._establish_session

    async def closed_meanwhile(self: QMPClient) -> None:
        await made(self)
        if qemu.connections <= qemu.closes:
            while self.runstate is Runstate.RUNNING:  # until its reader has met the end
                await asyncio.sleep(0)

    monkeypatch.setattr(QMPClient, "_establish_session", closed_meanwhile)
    qemu = FakeQemu(closes=2)

    async def connect() -> object:
        monitor = Monitor()
        async with await asyncio.start_unix_server(qemu.serve, tmp_path / "qmp"):
            await asyncio.wait_for(monitor.connect(tmp_path / "qmp"), 30)
            try:
                return await monitor.execute("query-status", {})
            finally:
                await monitor.disconnect()

    assert asyncio.run(connect()) == {}
    assert qemu.connections == 3
