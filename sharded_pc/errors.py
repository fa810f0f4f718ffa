"""Who is to blame, and the exit code that says so.

Every failure a user can meet is one of these.  The text names what, where and the remedy; numbers
that belong to it are in the text once.  Causes are chained, never repeated.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of the commands (a contract, see README)."""

    COMPLETED = 0
    FAILED = 1
    USAGE = 2
    HOST = 3
    PROTOCOL = 4
    CONNECTION_LOST = 5
    GUEST_LOST = 6


class ShardedPcError(Exception):
    """Base of all our errors; `exit_code` is what a command ends with."""

    exit_code = ExitCode.FAILED


class UsageError(ShardedPcError):
    """The caller asked for something that makes no sense."""

    exit_code = ExitCode.USAGE


class HostError(ShardedPcError):
    """This machine cannot do it; the text names the remedy."""

    exit_code = ExitCode.HOST


class RemoteProtocolError(ShardedPcError):
    """The source sent what the protocol does not allow."""

    exit_code = ExitCode.PROTOCOL

    def __init__(self, what: str, *, offset: int | None = None, state: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.offset = offset
        self.state = state

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at stream offset {self.offset}"
        when = "" if self.state is None else f" in postcopy state {self.state}"
        return f"{self.what}{where}{when}"


class StreamEnded(RemoteProtocolError):
    """The stream ended in the middle."""


class LocalProtocolError(ShardedPcError):
    """Our own code asked for a step that the protocol does not allow: a bug here."""


class AttachError(ShardedPcError):
    """A guest's hand-over failed."""


class ConnectionLost(ShardedPcError):
    """The wire broke after LISTENING: the source still has the missing pages."""

    exit_code = ExitCode.CONNECTION_LOST


class ShardError(ShardedPcError):
    """A worker process failed or died."""


class GuestLost(ShardedPcError):
    """The guest that was to run here is gone."""

    exit_code = ExitCode.GUEST_LOST


class Cancelled(ShardedPcError):
    """The source, or somebody here, gave the migration up before LISTENING."""


class QmpError(Exception):
    """An error reply: QMP's class and a text (docs/interop/qmp-spec.rst)."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind
