"""`sharded-pc emulate`: the receiver beside a QEMU that sharded-pc-emulator becomes."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sharded_pc.cli import failed
from sharded_pc.errors import ExitCode, ShardedPcError, UsageError

if TYPE_CHECKING:
    from sharded_pc.destination.process import QemuProcess
    from sharded_pc.emulator.settings import EmulatorSettings
    from sharded_pc.settings import Settings

NAME_ROOM = 48
"""Letters of a guest's name in its receiver's; a digest follows where something was left out."""


class Emulate:
    """Started by sharded-pc-emulator, by nobody else."""

    name = "emulate"
    help = "started by sharded-pc-emulator beside a QEMU (docs/libvirt.md)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--settings", required=True, metavar="FOLDER")
        parser.add_argument("--pid", required=True, type=int)
        parser.add_argument("--answer-fd", required=True, type=int, help="-1: a dead one's place")
        parser.add_argument("--stream-fds", default="", help="a migration may come by these")
        parser.set_defaults(qemu=[])

    def run(self, args: argparse.Namespace) -> int:
        place = Place(args.pid, args.answer_fd)
        try:
            settings = _settings(args, place)
            if args.answer_fd >= 0:
                _remove_dead(settings.name)
            else:
                settings = dataclasses.replace(settings, incoming=None, resume=True)
        except ShardedPcError as error:
            if not place.stand_aside(str(error)):
                failed(error)
            return int(error.exit_code)
        return asyncio.run(_receive(settings, place))


class Place:
    """The process that becomes QEMU once it is told how, or that it has to do without us."""

    def __init__(self, pid: int, answer_fd: int) -> None:
        from sharded_pc.destination.process import start_time

        self._pid, self._started = pid, start_time(pid)
        self._answer_fd = answer_fd

    async def become(self, arguments: Sequence[str], added: Mapping[str, str]) -> QemuProcess:
        """As settings.launch."""
        from sharded_pc.destination.process import QemuProcess
        from sharded_pc.emulator import answer

        process = QemuProcess.adopt(self._pid, self._started)
        answer.send(self._answer_fd, answer.become(arguments, added))
        self._answer_fd = -1
        return process

    def stand_aside(self, why: str) -> bool:
        """False if it has become QEMU already."""
        from sharded_pc.emulator import answer

        if self._answer_fd < 0:
            return False
        answer.send(self._answer_fd, answer.stand_aside(why))
        self._answer_fd = -1
        return True


def _settings(args: argparse.Namespace, place: Place) -> Settings:
    """UsageError: this receiver does not serve that guest."""
    from sharded_pc import address, runtime_folder
    from sharded_pc.emulator import settings as emulator
    from sharded_pc.qemu_args import management
    from sharded_pc.settings import Settings

    ours = emulator.read(Path(args.settings))
    logging.getLogger().setLevel(ours.log_level.upper())
    guest = management.guest_name(args.qemu)
    incoming = address.parse(management.incoming(args.qemu))
    words = management.deferred(args.qemu)
    _check_wanted(ours, guest, words)
    listener = management.monitor_listener(words)
    if listener is None and isinstance(incoming, address.DeferAddress):
        raise UsageError("-incoming defer: no -mon or -qmp of a listening Unix socket, where "
                         "migrate-incoming could come")  # fmt: skip
    name = _receiver_name(guest)
    return Settings(
        incoming=incoming,
        name=name,
        workers=ours.workers,
        placement=ours.placement,
        reserve=ours.reserve,
        attach=runtime_folder.runtime_path(name, runtime_folder.ATTACH),
        control=runtime_folder.runtime_path(name, runtime_folder.CONTROL),
        runs=True,
        qemu=words,
        launch=place.become,
        monitor=listener,
        stream_fds=tuple(map(int, filter(None, args.stream_fds.split(",")))),
    )


def _check_wanted(ours: EmulatorSettings, guest: str, words: Sequence[str]) -> None:
    from sharded_pc import qemu_args

    memory = sum(block.size for block in qemu_args.backends(words))
    if (why := ours.why_not(guest, memory)) is not None:
        raise UsageError(why)


def _receiver_name(guest: str) -> str:
    """The same each time this guest comes: what a receiver that was killed has left is found."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", guest)[:NAME_ROOM]
    if plain == guest and guest not in ("", "sem"):
        return guest
    text = guest or f"pid {os.getpid()}"
    return f"{plain or 'guest'}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:8]}"


def _remove_dead(name: str) -> None:
    """Of this guest's last time here: it comes anew, so nobody goes on with that."""
    from sharded_pc import runtime_folder, shm

    for found in shm.receivers():
        if found.name == name and not found.alive:
            shm.remove(found, lambda: runtime_folder.clean(name))


async def _receive(settings: Settings, place: Place) -> int:
    """Until the guest needs nobody any more, or its QEMU ends."""
    from sharded_pc.cli.receive import Signals
    from sharded_pc.coordinator import Coordinator

    signals = Signals()
    coordinator = Coordinator(settings)
    signals.call(coordinator.quit)
    try:
        async with coordinator:
            try:
                await coordinator.receive()
            except ShardedPcError as error:
                return signals.exit_code or failed(error)
            await coordinator.retire()
            assert coordinator.destination is not None
            await coordinator.destination.leave_monitor()
            coordinator.destination.leave()
    except ShardedPcError as error:
        if not place.stand_aside(str(error)):
            failed(error)
        return int(error.exit_code)
    return int(ExitCode.COMPLETED)
