"""The emulator's settings: /etc/sharded-pc.toml, and sharded-pc.toml beside the emulator."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sharded_pc.errors import UsageError
from sharded_pc.geometry import Placement
from sharded_pc.qemu_args.syntax import size_bytes

FILE = "sharded-pc.toml"
EVERYWHERE = Path("/etc") / FILE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorSettings:
    """Keys of the file are these names with `-` for `_`."""

    qemu: str = "qemu-system-x86_64"
    """emulator.c's"""
    receiver: str = ""
    """emulator.c's: the command `sharded-pc`, if it is not beside the emulator"""
    strict: bool = False
    """emulator.c's: a guest that no receiver serves is not taken at all"""
    workers: int = 2
    placement: Placement | None = None
    reserve: bool = False
    least_memory: int = 0
    """bytes; QEMU takes smaller guests by itself"""
    guests: tuple[str, ...] = ("*",)
    """patterns of guests' names; QEMU takes others by itself"""
    log_level: str = "warning"

    def why_not(self, name: str, memory: int) -> str | None:
        """Why QEMU is to take a guest by itself; None: it is not."""
        if not any(fnmatchcase(name, pattern) for pattern in self.guests):
            return f"guest {name!r} is none of `guests` in {FILE}"
        if memory < self.least_memory:
            return f"the guest has {memory} bytes of RAM, least-memory in {FILE} is larger"
        return None


def read(folder: Path) -> EmulatorSettings:
    """What counts for an emulator in `folder`; UsageError names file and key."""
    found: dict[str, Any] = {}
    for path in (EVERYWHERE, folder / FILE):
        found |= _read_file(path)
    return EmulatorSettings(**found)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    return {key.replace("-", "_"): _value(path, key, value) for key, value in values.items()}


def _value(path: Path, key: str, value: Any) -> Any:
    check = _KEYS.get(key)
    if check is None:
        raise UsageError(f"{path}: no key {key!r}; there are {', '.join(_KEYS)}")
    try:
        return check(value)
    except (ValueError, TypeError, UsageError):
        raise UsageError(f"{path}: {key} = {value!r} is none of its values") from None


def _typed(kind: type):
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return check


def _placement(value: Any) -> Placement | None:
    return None if value == "auto" else Placement(value)


def _patterns(value: Any) -> tuple[str, ...]:
    return tuple(map(_typed(str), _typed(list)(value)))


def _level(value: Any) -> str:
    if value not in ("debug", "info", "warning", "error"):
        raise ValueError
    return value


_KEYS: Mapping[str, Any] = {
    "qemu": _typed(str),
    "receiver": _typed(str),
    "strict": _typed(bool),
    "workers": _typed(int),
    "placement": _placement,
    "reserve": _typed(bool),
    "least-memory": lambda value: size_bytes(value, "B"),
    "guests": _patterns,
    "log-level": _level,
}
