"""What is asked of a destination QEMU, and told to it, over a monitor of our own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from sharded_pc.destination import blocks
from sharded_pc.errors import ShardedPcError, UsageError
from sharded_pc.geometry import RamBlock

log = logging.getLogger(__name__)

CAPABILITIES = ("x-ignore-shared", "events")
"""What the synthetic stream needs: RAM that stays where it is, and word of how loading ends."""
RETRY_SECONDS = 0.01


class QemuFailed(ShardedPcError):
    """QEMU did not start, or did not take the stream; its own message is on standard error."""


class Monitor:
    """A QMP client that knows a migration's destination."""

    def __init__(self) -> None:
        self._qmp = QMPClient("destination")
        self._qmp.logger.setLevel(logging.CRITICAL + 1)  # what goes wrong is raised as well
        self._events = EventListener(("MIGRATION",))
        self._connected = asyncio.Event()
        self._before: dict[str, bool] = {}
        """capabilities as the user had them"""
        self.has_loaded = False
        """QEMU has taken its stream"""
        self._put_off: dict[str, object] = {}

    async def connect(self, path: Path) -> None:
        """As soon as QEMU listens there; the caller sets the time limit."""
        while True:
            try:
                await self._qmp.connect(str(path))
                break
            except (QMPError, OSError, AssertionError):
                # The library asserts that QEMU has not closed the connection as it was made.
                await self.disconnect()
            await asyncio.sleep(RETRY_SECONDS)
        self._qmp.register_listener(self._events)
        self._connected.set()

    async def execute(self, command: str, arguments: dict) -> object:
        """As soon as it is connected; ExecuteError."""
        await self._connected.wait()
        return await self._qmp.execute(command, arguments)

    async def set_capabilities(self, states: Mapping[str, bool]) -> None:
        """As execute()."""
        await self._connected.wait()
        await self._set(states)

    async def set_parameters(
        self, parameters: Mapping[str, object], *, put_off: Sequence[str]
    ) -> None:
        """As execute(); those to be `put_off` when QEMU has taken the stream."""
        later = {} if self.has_loaded else {k: parameters[k] for k in put_off if k in parameters}
        now = {name: value for name, value in parameters.items() if name not in later}
        if now or not later:
            await self.execute("migrate-set-parameters", now)
        self._put_off |= later

    async def disconnect(self) -> None:
        """Never raises."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._qmp.disconnect()

    # What QEMU itself compares only when the source's guest has stopped

    async def check_machine(self, wanted: str) -> None:
        """UsageError unless this is the source's machine type; "": unknown."""
        ours = str(await self._property("/machine", "type") or "").removesuffix("-machine")
        if wanted and ours and ours != wanted:
            raise UsageError(
                f"the destination's machine type is {ours}, the source's {wanted}: start the "
                f"destination with -machine {wanted}"
            )

    async def check_blocks(self, wanted: Iterable[RamBlock]) -> None:
        """UsageError unless QEMU has these blocks."""
        with contextlib.suppress(ExecuteError):  # a QEMU without HMP still compares later
            command = {"command-line": "info ramblock"}
            listed = blocks.parse(await self._qmp.execute("human-monitor-command", command))
            if listed:
                blocks.compare(wanted, listed)

    async def check_private(self, names: Iterable[str]) -> None:
        """UsageError if one of these blocks, which QEMU is to load from the stream, is of a memory
        backend that is shared: x-ignore-shared would refuse its pages."""
        private = set(names)
        for backend in await self._qmp.execute("query-memdev"):
            if backend.get("share") and backend.get("id") in private:
                raise UsageError(
                    f"QEMU memory backend {backend.get('id')!r} is shared (share=on) with somebody "
                    f"else: give it share=off"
                )

    async def address(self, backend: str) -> int:
        """MemoryRegion.addr of a backend's memory, which QEMU compares for ignored blocks."""
        found = await self._property(f"/objects/{backend}/{backend}[0]", "addr")
        if not isinstance(found, int):
            raise QemuFailed(f"QEMU does not tell where memory backend {backend!r} is mapped")
        return found

    async def _property(self, path: str, name: str) -> object:
        with contextlib.suppress(ExecuteError):
            return await self._qmp.execute("qom-get", {"path": path, "property": name})
        return None

    # The stream

    async def listen_for_stream(self, path: Path) -> None:
        """QemuFailed."""
        try:
            for each in await self._qmp.execute("query-migrate-capabilities"):
                if each["capability"] in CAPABILITIES:
                    self._before[each["capability"]] = each["state"]
            await self._set(dict.fromkeys(CAPABILITIES, True))
            await self._qmp.execute("migrate-incoming", {"uri": f"unix:{path}"})
        except ExecuteError as error:
            raise QemuFailed(f"QEMU does not wait for the stream: {error}") from error

    async def put_back(self, *names: str) -> str | None:
        """Capabilities are as the user had them: a guest that is migrated on, saved or dumped
        afterwards takes its RAM along.  QEMU's words if it keeps one."""
        try:
            await self._set({name: self._before.get(name, False) for name in names})
        except ExecuteError as error:
            return str(error)
        return None

    async def _set(self, states: Mapping[str, bool]) -> None:
        pairs = [{"capability": name, "state": on} for name, on in states.items()]
        await self._qmp.execute("migrate-set-capabilities", {"capabilities": pairs})

    async def loaded(self) -> None:
        """Returns when QEMU has taken the stream; QemuFailed."""
        async for event in self._events:
            status = event.get("data", {}).get("status")
            if status == "completed":
                break
            if status == "failed":
                raise QemuFailed(
                    "QEMU did not take the device state (its message stands above); are its "
                    "arguments those of the source?"
                )
        self.has_loaded = True
        if self._put_off:
            await self._qmp.execute("migrate-set-parameters", self._put_off)
