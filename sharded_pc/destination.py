"""A stock QEMU that goes on with the source's guest on our shared memory.

It is started when the source's blocks are known, with the preload library that hands its
userfaultfds over as it maps the segments; when the source's device state is here it is fed a
synthetic precopy stream (wire/resume.py) and runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from sharded_pc import qemu_args
from sharded_pc.attach.preload import environment, library_path
from sharded_pc.errors import GuestLost, HostError, ShardedPcError, UsageError
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.memory import GuestMemory
from sharded_pc.native.records import block_records
from sharded_pc.shm import ROOT
from sharded_pc.wire import resume

log = logging.getLogger(__name__)

START_SECONDS = 30.0
"""From starting QEMU to its monitor answering with its memory mapped."""
PAGES_SECONDS = 60.0
"""For the pages of blocks that are not shared to arrive after they were asked for."""
LOAD_SECONDS = 60.0
"""For QEMU to take the device state."""
EXIT_SECONDS = 2.0
"""From QEMU's monitor closing to its exit code."""
CHUNK_PAGES = 256


class QemuFailed(ShardedPcError):
    """QEMU did not start, or did not take the stream; its own message is on standard error."""


class QemuDestination:
    """One destination.  `arguments` is the user's command line, program first; sockets are made in
    `folder`.  `request(block, page, count)` asks the source for pages; `has_attached(pid)` tells
    whether that process has handed its userfaultfds over; QEMU's standard output goes to the
    descriptor `stdout`, to ours if None."""

    def __init__(
        self,
        arguments: Sequence[str],
        memory: GuestMemory,
        folder: Path,
        attach_path: str,
        request: Callable[[int, int, int], None],
        has_attached: Callable[[int], bool],
        stdout: int | None = None,
    ) -> None:
        self._arguments = arguments
        self._memory = memory
        self._folder = folder
        self._attach_path = attach_path
        self._request = request
        self._has_attached = has_attached
        self._stdout = stdout
        self._plan: qemu_args.Plan | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._exit: asyncio.Task[int] | None = None
        self._qmp = QMPClient("destination")
        self._qmp.logger.setLevel(logging.CRITICAL + 1)  # what goes wrong is raised as well
        self._events = EventListener(("MIGRATION", "RESUME"))
        self.resumed = False

    def check(self) -> None:
        """What can be refused before a source connects; HostError, UsageError."""
        qemu_args.check_arguments(self._arguments)
        program = self._arguments[0]
        if shutil.which(program) is None:
            raise HostError(
                f"QEMU {program!r} is not there; install it (Debian: apt-get install "
                f"qemu-system-x86) or name it with its path"
            )
        library_path()

    async def start(self, machine: str) -> None:
        """Starts QEMU on the segments and waits until it has mapped them; HostError, UsageError,
        QemuFailed.  `machine`: the source's machine type, "" if unknown."""
        ram = self._memory.geometry
        assert ram is not None
        paths = {
            block.name: str(ROOT / segment.name.lstrip("/"))
            for block, segment in zip(ram.blocks, self._memory.blocks, strict=True)
        }
        self._plan = qemu_args.plan(self._arguments, ram.blocks, paths)
        shared = [paths[backend.block.name] for backend in self._plan.backends]
        monitor = self._folder / "monitor"
        added = environment(self._attach_path, shared, timeout=START_SECONDS, bound=True)
        arguments = [*self._plan.arguments, "-qmp", f"unix:{monitor},server=on,wait=off"]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *arguments, env={**os.environ, **added}, stdout=self._stdout
            )
        except OSError as error:
            raise HostError(f"start QEMU {arguments[0]!r}: {error.strerror}") from error
        self._exit = asyncio.create_task(self._process.wait())
        await self._unless_exited(self._connect(monitor), START_SECONDS, "open its monitor")
        if not self._has_attached(self._process.pid):
            raise QemuFailed(
                "QEMU runs without the preload library (a static or setuid binary?): its RAM would "
                "not wait for missing pages"
            )
        await self._unless_exited(self._prepare(machine), START_SECONDS, "wait for the stream")

    async def _connect(self, monitor: Path) -> None:
        while True:
            with contextlib.suppress(QMPError, OSError):
                await self._qmp.connect(str(monitor))
                break
            await asyncio.sleep(0.01)
        self._qmp.register_listener(self._events)

    async def _prepare(self, machine: str) -> None:
        await self._check_machine(machine)
        await self._listen_for_stream()

    async def _check_machine(self, wanted: str) -> None:
        """What QEMU itself compares only when the source's guest has stopped."""
        with contextlib.suppress(ExecuteError):  # if it does not tell, it still compares later
            where = {"path": "/machine", "property": "type"}
            ours = str(await self._qmp.execute("qom-get", where)).removesuffix("-machine")
            if wanted and ours != wanted:
                raise UsageError(
                    f"the destination's machine type is {ours}, the source's {wanted}: start the "
                    f"destination with -machine {wanted}"
                )

    async def _listen_for_stream(self) -> None:
        wanted = [{"capability": c, "state": True} for c in ("x-ignore-shared", "events")]
        try:
            await self._qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
            uri = f"unix:{self._folder / 'stream'}"
            await self._qmp.execute("migrate-incoming", {"uri": uri})
        except ExecuteError as error:
            raise QemuFailed(f"QEMU does not wait for the stream: {error}") from error

    async def _unless_exited(self, wanted: Awaitable, seconds: float, doing: str):
        """The result of `wanted`; QemuFailed if QEMU exits or `seconds` pass before."""
        assert self._exit is not None
        task = asyncio.ensure_future(wanted)
        try:
            await asyncio.wait(
                {task, self._exit}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done() and isinstance(task.exception(), QMPError):
                await asyncio.wait({self._exit}, timeout=EXIT_SECONDS)  # why the monitor closed
            elif task.done():
                return task.result()
            if self._exit.done():
                raise QemuFailed(
                    f"QEMU {_ending(self._exit.result())} before it could {doing} (its message "
                    f"stands above)"
                )
            if task.done():
                raise QemuFailed(f"QEMU's monitor failed: {task.exception()}") from task.exception()
            raise QemuFailed(f"QEMU did not {doing} within {seconds:.0f} s")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # Resuming

    async def resume(self, machine: str, devices: bytes) -> None:
        """Feeds QEMU what it needs to go on; returns when it has taken it (and runs, unless -S).
        QemuFailed."""
        await self._all_private_pages()
        await self._unless_exited(
            asyncio.to_thread(self._send_stream, machine, devices),
            LOAD_SECONDS,
            "take the device state",
        )
        await self._unless_exited(self._taken(), LOAD_SECONDS, "take the device state")
        self.resumed = True

    def _private(self) -> list[tuple[int, RamBlock]]:
        """Blocks that QEMU keeps in memory of its own, with their index."""
        assert self._plan is not None and self._memory.geometry is not None
        shared = {backend.block.name for backend in self._plan.backends}
        blocks = enumerate(self._memory.geometry.blocks)
        return [(index, block) for index, block in blocks if block.name not in shared]

    def _missing_private(self) -> Iterator[tuple[int, int, int]]:
        """(block, first page, pages) of each stretch of private blocks that has not arrived."""
        received = self._memory.received
        for index, block in self._private():
            first_bit, page = self._memory.control.block(index)[2], 0
            while page < block.pages:
                here = first_bit + page
                run = received.run(here, block.pages - page)
                if not received.test(here):
                    yield index, page, run
                page += run

    async def _all_private_pages(self) -> None:
        """A guest's fault asks for one page; here whole stretches are asked for at once."""
        for index, page, count in list(self._missing_private()):
            self._memory.requested.set(self._memory.control.block(index)[2] + page, count)
            self._request(index, page, count)
        await self._unless_exited(self._private_here(), PAGES_SECONDS, "get its own blocks' pages")

    async def _private_here(self) -> None:
        """The placing processes have no way to call us: looks every millisecond."""
        while next(self._missing_private(), None):
            await asyncio.sleep(0.001)

    def _names(self) -> list[tuple[RamBlock, int]]:
        """All blocks under the destination's names, with their addresses (MemoryRegion.addr, which
        QEMU compares): backends of the machine's RAM follow each other."""
        assert self._plan is not None and self._memory.geometry is not None
        backends = {backend.block.name: backend for backend in self._plan.backends}
        sizes = [backend.block.size for backend in self._plan.backends]
        addresses = dict(zip(backends, itertools.accumulate(sizes, initial=0), strict=False))
        out = []
        for block in self._memory.geometry.blocks:
            backend = backends.get(block.name)
            name = backend.id if backend else block.name
            out.append((RamBlock(name, block.size), addresses.get(block.name, 0)))
        return out

    def _send_stream(self, machine: str, devices: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(LOAD_SECONDS)
            try:
                sock.connect(str(self._folder / "stream"))
                sock.sendall(resume.head(machine, self._names()))
                for index, block in self._private():
                    self._send_block(sock, index, block)
                sock.sendall(resume.tail(devices))
            except OSError as error:
                # QEMU has closed the stream: its monitor says why.
                log.debug("the destination closed its stream: %s", error)

    def _send_block(self, sock: socket.socket, index: int, block: RamBlock) -> None:
        """Reads by descriptor: our mapping is in no userfaultfd, but holes stay holes."""
        fd, step = self._memory.blocks[index].fd, CHUNK_PAGES * PAGE_BYTES
        for offset in range(0, block.size, step):
            content = os.pread(fd, min(step, block.size - offset), offset)
            sock.sendall(block_records(block.name, offset // PAGE_BYTES, content))

    async def _taken(self) -> None:
        async for event in self._events:
            status = event.get("data", {}).get("status") if event["event"] == "MIGRATION" else None
            if status == "completed":
                return
            if status == "failed":
                raise QemuFailed(
                    "QEMU did not take the device state (its message stands above); are its "
                    "arguments those of the source?"
                )

    # Afterwards

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def exited(self) -> int:
        """QEMU's exit code, when it ends; 128 + N for a signal."""
        assert self._exit is not None
        code = await asyncio.shield(self._exit)
        return 128 - code if code < 0 else code

    async def lost(self) -> None:
        """Raises GuestLost when QEMU ends (QemuFailed if its guest never ran here); never returns
        otherwise."""
        assert self._exit is not None
        code = await asyncio.shield(self._exit)
        if self.resumed:
            raise GuestLost(f"QEMU {_ending(code)} while pages were missing")
        raise QemuFailed(f"QEMU {_ending(code)} before the guest could go on there")

    def terminate(self) -> None:
        """Asks QEMU to end, as SIGTERM does."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        """Not by asyncio's process: its send_signal() may take the exit code from its watcher."""
        if self._process is not None and self._exit is not None and not self._exit.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def leave_monitor(self) -> None:
        """The monitor is no longer needed; the guest goes on."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._qmp.disconnect()

    async def end(self) -> None:
        """No QEMU afterwards: killed if it is still there.  Never raises."""
        await self.leave_monitor()
        self._signal(signal.SIGKILL)
        if self._exit is not None:
            await asyncio.gather(self._exit, return_exceptions=True)


def _ending(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
