"""Where `--record FILE` writes down what a source sends: its main channel in FILE, each other one
beside it, in FILE.preempt, FILE.multifd-0, FILE.multifd-1 ... by the channel's number."""

from __future__ import annotations

import os

from sharded_pc.errors import HostError


class Recording:
    """Of one connection.  Descriptors that it gives are open until close(); HostError from all that
    opens a file."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._fds: list[int] = []
        self.main_fd = self._open(path)

    def preempt(self) -> int:
        """A descriptor for postcopy-preempt's channel."""
        return self._open(f"{self._path}.preempt")

    def multifd(self, number: int, opening: bytes) -> str:
        """A file that begins with what was read of the channel before, for append_to()."""
        path = f"{self._path}.multifd-{number}"
        fd = self._open(path)
        try:
            os.write(fd, opening)
        except OSError as error:
            raise _failed(path, error) from error
        return path

    def _open(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._fds.append(os.open(path, flags, 0o600))
        except OSError as error:
            raise _failed(path, error) from error
        return self._fds[-1]

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def append_to(path: str) -> int:
    """In a worker, a descriptor that becomes the caller's; HostError."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: str, error: OSError) -> HostError:
    return HostError(f"record to {path}: {error.strerror}")
