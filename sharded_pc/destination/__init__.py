"""A stock QEMU that goes on with the source's guest on our shared memory.

It is started before anything is known of the source, on segments made from its command line, with
the preload library that hands its userfaultfds over as it maps them; when the source's blocks are
known they are compared, and when its device state is here QEMU is fed a synthetic precopy stream
(wire/resume.py) and runs.

``blocks`` is pure; ``monitor``, ``process`` and ``stream`` each know one way of dealing with QEMU;
here they are put together.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from sharded_pc import qemu_args
from sharded_pc.attach.preload import environment, library_path
from sharded_pc.awaited import AwaitedPages
from sharded_pc.destination import back_ends
from sharded_pc.destination.monitor import Monitor, QemuFailed
from sharded_pc.destination.process import QemuProcess
from sharded_pc.destination.stream import ResumeStream
from sharded_pc.errors import HostError
from sharded_pc.geometry import RamBlock
from sharded_pc.memory import GuestMemory

__all__ = ["QemuDestination", "QemuFailed", "check"]

log = logging.getLogger(__name__)

START_SECONDS = 30.0
"""From starting QEMU to its monitor answering with its memory mapped."""
PAGES_SECONDS = 60.0
"""For the pages of blocks that are not shared to arrive after they were asked for."""
LOAD_SECONDS = 60.0
"""For QEMU to take the device state."""


def check(arguments: Sequence[str]) -> None:
    """What can be refused before a source connects; HostError, UsageError."""
    others = qemu_args.check_arguments(arguments)
    program = arguments[0]
    if shutil.which(program) is None:
        raise HostError(
            f"QEMU {program!r} is not there; install it (Debian: apt-get install "
            f"qemu-system-x86) or name it with its path"
        )
    library_path()
    back_ends.check_guests(others)


Launch = Callable[[Sequence[str], Mapping[str, str]], Awaitable[QemuProcess]]
"""How QEMU is started, with these arguments and this added to its environment; HostError."""


class QemuDestination:
    """One destination.  `arguments` is the user's command line, program first; its monitor and the
    stream it is fed get the `sockets`.  `ask()` has the source asked for pages that are requested;
    `attached(pid)` answers which process, that one or a child of it, has handed its userfaultfds
    over."""

    def __init__(
        self,
        arguments: Sequence[str],
        memory: GuestMemory,
        sockets: tuple[Path, Path],
        attach_path: str,
        ask: Callable[[], None],
        attached: Callable[[int], int | None],
        launch: Launch = QemuProcess.start,
    ) -> None:
        self._arguments = arguments
        self._memory = memory
        self._monitor_path, self._stream_path = sockets
        self._attach_path = attach_path
        self._ask = ask
        self._attached = attached
        self._launch = launch
        self._environment: Mapping[str, str] = {}
        self._backends: tuple[qemu_args.Backend, ...] = ()
        """known with the source's blocks"""
        self._process: QemuProcess | None = None
        self.monitor = Monitor()
        self._names: list[tuple[RamBlock, int]] = []
        """all blocks under the destination's names, with their addresses"""
        self.resumed = False
        self._left = False

    # Starting

    def backends(self) -> tuple[RamBlock, ...]:
        """What becomes segments, by their ids; UsageError."""
        return qemu_args.backends(self._arguments)

    async def start(self) -> None:
        """Starts QEMU on the segments of its backends (`memory.backends`) and waits until it has
        mapped them; HostError, UsageError, QemuFailed."""
        assert self._memory.backends is not None
        paths = self._memory.backends.paths
        words = qemu_args.plan(self._arguments, paths)
        added = environment(
            self._attach_path, list(paths.values()), timeout=START_SECONDS, bound=True
        )
        arguments = [*words, "-qmp", f"unix:{self._monitor_path},server=on,wait=off"]
        added |= self._environment
        process = self._process = await self._launch(arguments, added)
        connecting = self.monitor.connect(self._monitor_path)
        await process.unless_exited(connecting, START_SECONDS, "open its monitor")
        self._check_attached(process)

    def relay_monitor(self, listener: str, path: str) -> None:
        """Before start(): who connects to that monitor of QEMU's meets a relay, whose other end is
        the socket at `path` (management.py)."""
        self._environment = {"SHARDED_PC_MONITOR": listener, "SHARDED_PC_MONITOR_RELAY": path}

    def match(self, blocks: Sequence[RamBlock]) -> list[RamBlock]:
        """Those of the source's blocks that the backends stand for, in the backends' order;
        UsageError."""
        self._backends = qemu_args.match(self._arguments, blocks)
        return [backend.block for backend in self._backends]

    async def await_stream(self, machine: str) -> None:
        """The geometry is known: QEMU is found to fit the source, and waits for its stream;
        UsageError, QemuFailed.  `machine`: the source's machine type, "" if unknown."""
        assert self._process is not None
        preparing = self._prepare(machine)
        await self._process.unless_exited(preparing, START_SECONDS, "wait for the stream")

    def _check_attached(self, process: QemuProcess) -> None:
        pid = self._attached(process.pid)
        if pid is None:
            raise QemuFailed(
                "QEMU runs without the preload library (a static or setuid binary?): its RAM would "
                "not wait for missing pages"
            )
        process.found(pid)

    async def _prepare(self, machine: str) -> None:
        monitor = self.monitor
        await monitor.check_machine(machine)
        await monitor.check_private(block.name for _, block in self._private())
        self._names = await self._named_blocks()
        await monitor.check_blocks(block for block, _ in self._names)
        await monitor.listen_for_stream(self._stream_path)

    async def _named_blocks(self) -> list[tuple[RamBlock, int]]:
        assert self._memory.geometry is not None
        ids = {backend.block.name: backend.id for backend in self._backends}
        out = []
        for block in self._memory.geometry.blocks:
            id_ = ids.get(block.name)
            address = await self.monitor.address(id_) if id_ else 0
            out.append((RamBlock(id_ or block.name, block.size), address))
        return out

    async def adopt(self, pid: int, start: int) -> None:
        """A QEMU of a receiver that died, whose guest runs; GuestLost if it is gone."""
        self._process = QemuProcess.adopt(pid, start)
        self.resumed = True

    async def meet_again(self) -> None:
        """Its monitor, as the receiver that died had it; QemuFailed."""
        assert self._process is not None
        self.monitor.has_loaded = True
        connecting = self.monitor.connect(self._monitor_path)
        await self._process.unless_exited(connecting, START_SECONDS, "open its monitor")

    # Resuming

    async def resume(self, machine: str, devices: bytes) -> None:
        """Feeds QEMU what it needs to go on; returns when it has taken it (and runs, unless -S).
        QemuFailed."""
        assert self._process is not None
        await self._all_private_pages(self._process)
        loading = self._load(machine, devices)
        await self._process.unless_exited(loading, LOAD_SECONDS, "take the device state")
        self.resumed = True
        self._memory.control.note_destination(*self._process.identity())

    async def _load(self, machine: str, devices: bytes) -> None:
        """x-ignore-shared is put back before QEMU has its devices, so that there is no moment at
        which its guest runs and could be migrated on, or saved, without its RAM."""
        stream = ResumeStream(self._stream_path, self._memory, LOAD_SECONDS)
        try:
            await asyncio.to_thread(stream.send_ram, machine, self._names, self._private())
            await self.monitor.put_back("x-ignore-shared")
            await asyncio.to_thread(stream.send_devices, devices)
            await self.monitor.loaded()
        finally:
            stream.close()
        if why := await self.monitor.put_back("x-ignore-shared", "events"):
            log.error(
                "QEMU keeps the capability x-ignore-shared (%s): do not save this guest or migrate "
                "it on, its RAM would be left out; turn it off by migrate-set-capabilities", why,
            )  # fmt: skip

    def _private(self) -> list[tuple[int, RamBlock]]:
        """Blocks that QEMU keeps in memory of its own, with their index."""
        assert self._memory.geometry is not None
        shared = {backend.block.name for backend in self._backends}
        blocks = enumerate(self._memory.geometry.blocks)
        return [(index, block) for index, block in blocks if block.name not in shared]

    async def _all_private_pages(self, process: QemuProcess) -> None:
        """A guest's fault asks for one page; here whole stretches are asked for at once."""
        spans = [
            (index, page, count)
            for index, _ in self._private()
            for page, count in self._memory.missing(index)
        ]
        arriving = AwaitedPages(self._memory, spans).arrive(self._ask)
        await process.unless_exited(arriving, PAGES_SECONDS, "get its own blocks' pages")

    # Afterwards

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def exited(self) -> int:
        """QEMU's exit code, when it ends; 128 + N for a signal."""
        assert self._process is not None
        return await self._process.exited()

    async def lost(self) -> None:
        """Raises GuestLost when QEMU ends (QemuFailed if its guest never ran here); never returns
        otherwise."""
        assert self._process is not None
        await self._process.lost(resumed=lambda: self.resumed)

    def terminate(self) -> None:
        """Asks QEMU to end, as SIGTERM does."""
        if self._process is not None:
            self._process.terminate()

    async def leave_monitor(self) -> None:
        """The monitor is no longer needed; the guest goes on."""
        await self.monitor.disconnect()

    def leave(self) -> None:
        """The guest is not ours to end any more."""
        self._left = True

    async def end(self) -> None:
        """No QEMU afterwards: killed if it is still there.  Never raises."""
        await self.leave_monitor()
        if self._process is not None and not self._left:
            await self._process.end()
