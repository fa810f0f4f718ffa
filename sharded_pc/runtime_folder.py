"""A receiver's own folder, in which its sockets stand.

It is $XDG_RUNTIME_DIR/sharded-pc-NAME, or sharded-pc-UID-NAME in the folder of temporary files
where the environment has no XDG_RUNTIME_DIR.  Guests and control clients find it by the receiver's
name, so everybody can guess it, and in /tmp everybody can be there first: only a folder that is
ours and closed to others is used.  Who cannot enter it can neither reach a socket nor put one in
its place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from sharded_pc.address import MAX_PATH_BYTES
from sharded_pc.errors import HostError, UsageError
from sharded_pc.shm import check_name

ATTACH, CONTROL = "attach", "control"
"""Sockets of the receiver."""
MONITOR, STREAM, RELAY = "monitor", "stream", "relay"
"""Sockets of a destination QEMU."""
REMOVALS = 3
MIGRATION = "migration"
"""The demo's source connects there."""


def places(name: str) -> list[Path]:
    """Where a receiver's folder may stand, the place of a new one first; UsageError."""
    check_name(name)
    shared = Path(tempfile.gettempdir()) / f"sharded-pc-{os.geteuid()}-{name}"
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    # The XDG base directory specification: a path that is not absolute is to be ignored.
    return [Path(own) / f"sharded-pc-{name}", shared] if os.path.isabs(own) else [shared]


def places_of(uid: int, name: str) -> list[Path]:
    """Where a folder of another user's receiver stands if its environment is the usual one;
    UsageError."""
    check_name(name)
    shared = Path(tempfile.gettempdir()) / f"sharded-pc-{uid}-{name}"
    return [Path(f"/run/user/{uid}/sharded-pc-{name}"), shared]


def runtime_path(name: str, what: str) -> str:
    """Where a receiver's socket stands unless the user says otherwise; UsageError."""
    path = str(places(name)[0] / what)
    if (length := len(os.fsencode(path))) > MAX_PATH_BYTES:
        raise UsageError(
            f"the socket {path} would have a path of {length} bytes, a socket's has at most "
            f"{MAX_PATH_BYTES}: choose a shorter --name, or give --attach and --control"
        )
    return path


def make(name: str) -> Path:
    """The folder, new or as a receiver of that name has left it; HostError."""
    folder = places(name)[0]
    try:
        _check_parent(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        why = _why_unsafe(folder)
    except OSError as error:
        raise HostError(
            f"make the runtime folder {folder}: {error.strerror}; set XDG_RUNTIME_DIR to a folder "
            f"of your own"
        ) from error
    if why is not None:
        raise HostError(
            f"the runtime folder {folder} {why}, so others could stand between this receiver and "
            f"its guests: see who made it, then remove it, or choose another --name"
        )
    return folder


def _check_parent(parent: Path) -> None:
    """Who may rename what stands in it could exchange the folder under our feet."""
    mode = parent.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise HostError(
            f"everybody may rename what stands in {parent} (mode {stat.S_IMODE(mode):04o}): set "
            f"XDG_RUNTIME_DIR to a folder of your own, or `chmod +t {parent}`"
        )


def _why_unsafe(folder: Path) -> str | None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder" if not stat.S_ISLNK(found.st_mode) else "is a symbolic link"
    if found.st_uid != os.geteuid():
        return f"belongs to uid {found.st_uid}"
    if found.st_mode & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def remove(folder: Path) -> None:
    """At a receiver's end; what somebody else has put there stays, and so does the folder.  A QEMU
    that ends with us may still make its sockets: it cannot once the folder is gone."""
    for _ in range(REMOVALS):
        for socket in (folder / MONITOR, folder / STREAM):
            socket.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
            return


def clean(name: str) -> None:
    """Removes what a dead receiver has left, wherever it may be; nothing that is not ours."""
    for folder in places(name):
        with contextlib.suppress(FileNotFoundError):
            if _why_unsafe(folder) is None:
                shutil.rmtree(folder)
