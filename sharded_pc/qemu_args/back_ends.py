"""vhost-user on QEMU's command line: processes that QEMU hands its RAM to, and where they listen.

Such a process has to be a guest of this receiver (`sharded-pc guest`).  Whether it is one can be
seen while it listens at a path (destination/back_ends.py); so a socket that it would connect to, or
that QEMU is given open, is refused.  Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from sharded_pc.errors import UsageError
from sharded_pc.qemu_args.command_line import CommandLine, Option
from sharded_pc.qemu_args.syntax import is_true

WHY = (
    "its back-end maps the RAM without a userfaultfd and would read zeros, unless it is started by "
    "`sharded-pc guest -- PROGRAM ARGS`"
)
_DEVICES = ("vhost-user-*",)
_OBJECTS = ("cryptodev-vhost-user", "vhost-user-backend")
_NETDEV = "vhost-user"
_WANTED = "give it chardev=ID of a -chardev socket,id=ID,path=PATH at which the back-end listens"


@dataclasses.dataclass(frozen=True, slots=True)
class BackEnd:
    """A process that maps QEMU's RAM."""

    what: str
    """which of QEMU's options is served by it, for people"""
    path: str
    """of the Unix socket at which it listens"""


def back_ends(line: CommandLine) -> tuple[BackEnd, ...]:
    """Those of this command line; UsageError for one that cannot be looked at."""
    chardevs = {str(v.get("id")): v for v in map(Option.values, line.named("-chardev"))}
    return tuple(_find(what, values, chardevs) for what, values in _users(line))


def _users(line: CommandLine) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for option in line.named("-device", "-object"):
        values = option.values()
        patterns = _DEVICES if option.name == "-device" else _OBJECTS
        name = values.get("driver" if option.name == "-device" else "qom-type")
        # A device may have its socket through an object, which is looked at by itself.
        if (
            any(fnmatchcase(str(name), pattern) for pattern in patterns)
            and "vhostuser" not in values
        ):
            yield f"{option.name[1:]} {name}", values
    for option in line.named("-netdev", "-nic", "-net"):
        values = option.values()
        if values.get("type") == _NETDEV:
            yield f"netdev {_NETDEV}", values


def _find(what: str, values: Mapping[str, Any], chardevs: Mapping[str, Mapping]) -> BackEnd:
    id_ = values.get("chardev")
    chardev = chardevs.get(str(id_))
    if id_ is None:
        raise UsageError(f"QEMU {what}: {WHY}; {_WANTED}")
    if chardev is None:
        raise UsageError(f"QEMU {what}: there is no chardev {str(id_)!r}; {_WANTED}")
    path = chardev.get("path")
    if chardev.get("backend") != "socket" or not path or is_true(chardev.get("server")):
        how = "is its socket's server" if path else "is no socket with a path"
        raise UsageError(
            f"QEMU {what}: {WHY}, which cannot be seen as chardev {str(id_)!r} {how}; {_WANTED}"
        )
    return BackEnd(what, str(path))
