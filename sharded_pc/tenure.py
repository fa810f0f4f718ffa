"""A receiver's hold on its name: memory and runtime folder, new ones or a dead receiver's."""

from __future__ import annotations

import contextlib

from sharded_pc import runtime_folder
from sharded_pc.errors import UsageError
from sharded_pc.memory import GuestMemory
from sharded_pc.settings import Settings
from sharded_pc.state import MigrationStatus
from sharded_pc.succession import NothingToResume, take_over


class Tenure:
    """Begins when it is made, and ends with leave(); UsageError, HostError.

    `resumes`: the memory is a dead receiver's, whose guests were the processes `guests_before`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folders = contextlib.ExitStack()
        self.resumes = False
        self.guests_before: frozenset[int] = frozenset()
        self.keeps_for_another = False
        """of a dead receiver's memory: somebody else may yet take it up"""
        self.memory = self._taken_over() or GuestMemory.create(settings.name, settings.workers)
        try:
            self._make_folder()
        except BaseException:
            self.keeps_for_another = True
            self.leave()
            raise

    def _taken_over(self) -> GuestMemory | None:
        """A dead receiver's; None: there is none, and a source may come instead."""
        settings = self._settings
        if not settings.resume:
            return None
        try:
            memory, self.guests_before = take_over(settings.name)
        except NothingToResume:
            if settings.incoming is None:
                raise
            return None
        name, destination = settings.name, memory.control.destination
        if (destination is not None) != settings.runs:
            memory.close()
            word = "receive" if destination is None else "run"
            raise UsageError(f"receiver {name!r} was a `{word}`: sharded-pc {word} --resume {name}")
        self.resumes = True
        return memory

    def _make_folder(self) -> None:
        """While the name is ours: no other receiver that lives uses the folder."""
        name = self._settings.name
        if self.resumes:
            self._folders.callback(runtime_folder.clean, name)  # what the dead one left
        if self._settings.needs_folder:
            self._folders.callback(runtime_folder.remove, runtime_folder.make(name))

    def leave(self) -> None:
        """Nobody uses the memory any more: its names go, but for what --keep or a successor
        wants."""
        self._folders.close()
        completed = self.memory.control.status is MigrationStatus.COMPLETED
        if self._settings.keep and completed:
            self.memory.unlink_all_but_ram()
        elif not (self.resumes and self.keeps_for_another):
            self.memory.unlink()
        self.memory.close()
