"""The destination's process: started with the preload library, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from qemu.qmp import QMPError

from sharded_pc.destination.monitor import QemuFailed
from sharded_pc.errors import GuestLost, HostError
from sharded_pc.processes import is_alive

log = logging.getLogger(__name__)

EXIT_SECONDS = 2.0
"""From QEMU's monitor closing to its exit code."""
END_SECONDS = 5.0
"""For a killed process to be gone."""


class QemuProcess:
    """What the user's command line started, and the QEMU in it: a shell or `numactl` may stand in
    front and live as long.  Or, adopted, the QEMU of a receiver that died."""

    def __init__(self, pid: int, exit_code: Awaitable[int] | None) -> None:
        """`exit_code`: of our child `pid`; None: it is not our child."""
        self.pid = pid
        """what the user's command line started"""
        self._is_child = exit_code is not None
        self._loop = asyncio.get_running_loop()
        self._qemu_pid = pid
        self._qemu_pidfd = -1
        """of a QEMU that is not our child, so that no other process is ever meant"""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        """QEMU itself"""
        self._exit = asyncio.ensure_future(exit_code or self._unknown_exit())
        self._exit.add_done_callback(lambda _: self._qemu_pidfd < 0 and self._note_ended())

    @classmethod
    async def start(
        cls, arguments: Sequence[str], environment: Mapping[str, str], stdout: int | None = None
    ) -> QemuProcess:
        """A child, whose standard output goes to the descriptor `stdout`, to ours if None;
        HostError."""
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments, env={**os.environ, **environment}, stdout=stdout
            )
        except OSError as error:
            raise HostError(f"start QEMU {arguments[0]!r}: {error.strerror}") from error
        return cls(process.pid, process.wait())

    @classmethod
    def adopt(cls, pid: int, start: int) -> QemuProcess:
        """The process that began at `start` (start_time); GuestLost if it is gone."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise GuestLost(f"QEMU (pid {pid}) has ended while its receiver was away") from None
        if start_time(pid) != start or not is_alive(pid):
            os.close(pidfd)
            raise GuestLost(f"QEMU (pid {pid}) has ended while its receiver was away")
        process = cls(pid, None)
        process._follow(pidfd)
        return process

    async def _unknown_exit(self) -> int:
        """Only a parent is told the exit code."""
        await asyncio.shield(self._ended)
        return 0

    def identity(self) -> tuple[int, int]:
        """(pid, start time) of the QEMU itself, which nobody else will ever have."""
        return self._qemu_pid, start_time(self._qemu_pid)

    def found(self, pid: int) -> None:
        """The process that mapped the RAM, a child of the other or the same."""
        self._qemu_pid = pid
        if pid != self.pid and self._qemu_pidfd < 0:
            with contextlib.suppress(ProcessLookupError):
                self._follow(os.pidfd_open(pid))

    def _follow(self, pidfd: int) -> None:
        self._qemu_pidfd = pidfd
        self._loop.add_reader(pidfd, self._note_ended)

    def _note_ended(self) -> None:
        if self._qemu_pidfd >= 0:
            self._loop.remove_reader(self._qemu_pidfd)
        if not self._ended.done():
            self._ended.set_result(None)

    async def exited(self) -> int:
        """The exit code of what the user's command line started, when that and QEMU have ended;
        128 + N for a signal."""
        await asyncio.shield(self._ended)
        code = await asyncio.shield(self._exit)
        return 128 - code if code < 0 else code

    async def _ending(self) -> str:
        """How QEMU ended, as far as is known: what stands in front of it may tell, or live on."""
        await asyncio.wait({self._exit}, timeout=EXIT_SECONDS)
        if not self._exit.done():
            return "ended"
        code = self._exit.result()
        return f"was killed by signal {-code}" if code < 0 else f"exited with {code}"

    async def lost(self, *, resumed: Callable[[], bool]) -> None:
        """Raises when QEMU ends: GuestLost if its guest has `resumed` here, else QemuFailed."""
        await asyncio.shield(self._ended)
        how = await self._ending()
        if resumed():
            raise GuestLost(f"QEMU {how} while pages were missing")
        raise QemuFailed(f"QEMU {how} before the guest could go on there")

    async def unless_exited(self, wanted: Awaitable, seconds: float, doing: str):
        """The result of `wanted`; QemuFailed if QEMU exits or `seconds` pass before."""
        task = asyncio.ensure_future(wanted)
        try:
            await asyncio.wait(
                {task, self._ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done() and isinstance(task.exception(), QMPError):
                await asyncio.wait({self._ended}, timeout=EXIT_SECONDS)  # why the monitor closed
            elif task.done():
                return task.result()
            if self._ended.done():
                how = await self._ending()
                raise QemuFailed(f"QEMU {how} before it could {doing} (its message stands above)")
            if task.done():
                raise QemuFailed(f"QEMU's monitor failed: {task.exception()}") from task.exception()
            raise QemuFailed(f"QEMU did not {doing} within {seconds:.0f} s")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def terminate(self) -> None:
        """Asks QEMU to end, as SIGTERM does; if it has, what stands in front of it."""
        self._signal(signal.SIGTERM)

    async def end(self) -> None:
        """No process afterwards, unless it may not be killed or is stuck in the kernel.  Never
        raises."""
        self._signal(signal.SIGKILL)
        if self._qemu_pidfd >= 0:
            await asyncio.wait({self._ended}, timeout=END_SECONDS)
            self._note_ended()
            os.close(self._qemu_pidfd)
            self._qemu_pidfd = -1
        self._signal(signal.SIGKILL)
        await asyncio.wait({self._exit}, timeout=END_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        """Not by asyncio's process: its send_signal() may take the exit code from its watcher."""
        with contextlib.suppress(ProcessLookupError):
            try:
                if self._qemu_pidfd >= 0 and not self._ended.done():
                    signal.pidfd_send_signal(self._qemu_pidfd, number)
                elif self._is_child and not self._exit.done():
                    os.kill(self.pid, number)
            except PermissionError:  # `sudo -u` stands in front
                log.warning("QEMU may not be signalled by this user; it is left running")


def start_time(pid: int) -> int:
    """Clock ticks from boot to the process's start (proc(5), stat, starttime); 0 if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
