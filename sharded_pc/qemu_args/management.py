"""What whoever manages a QEMU has put on its command line: the guest's name, its monitor, where the
migration comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sharded_pc.qemu_args.command_line import CommandLine
from sharded_pc.qemu_args.syntax import is_true, read_pairs


def guest_name(arguments: Sequence[str]) -> str:
    """`-name`'s; "" if there is none."""
    return str(CommandLine(arguments).merged("-name").get("guest", ""))


def incoming(arguments: Sequence[str]) -> str:
    """`-incoming`'s last value; "" if there is none."""
    found = CommandLine(arguments).named("-incoming")
    return found[-1].text if found else ""


def deferred(arguments: Sequence[str]) -> tuple[str, ...]:
    """The same command line, waiting for `migrate-incoming`."""
    words = list(arguments)
    for option in CommandLine(arguments).named("-incoming"):
        words[option.at] = "defer"
    return tuple(words)


def monitor_listener(arguments: Sequence[str]) -> str | None:
    """The listening Unix socket of the first QMP monitor: "fd:N", inherited, or its path; None if
    there is none, or QEMU connects by itself."""
    line = CommandLine(arguments)
    chardevs = {str(each.get("id")): each for each in map(_chardev, line.named("-chardev"))}
    for option in line.options:
        if option.name in ("-qmp", "-qmp-pretty"):
            chardev = _shorthand(option.text)
        elif option.name == "-mon" and option.values().get("mode") == "control":
            chardev = chardevs.get(str(option.values().get("chardev")), {})
        else:
            continue
        if (found := _listener(chardev)) is not None:
            return found
    return None


def _chardev(option: Any) -> dict[str, Any]:
    """-chardev, in QEMU's older or in QAPI's words (ChardevOptions)."""
    values = option.values()
    backend = values.get("backend")
    if not isinstance(backend, dict):
        return values
    data = _object(backend.get("data"))
    address = _object(_object(data.get("addr")).get("data"))
    flat = {
        "backend": backend.get("type"),
        "id": values.get("id"),
        "server": data.get("server", True),
    }
    if "str" in address:
        flat["fd"] = address["str"]
    return {**flat, **{key: address[key] for key in ("path",) if key in address}}


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shorthand(text: str) -> dict[str, Any]:
    """-qmp unix:PATH,server=on,wait=off"""
    kind, _, rest = text.partition(":")
    if kind != "unix":
        return {}
    path, _, options = rest.partition(",")
    return {"backend": "socket", "path": path, **dict(read_pairs(options))}


def _listener(chardev: dict[str, Any]) -> str | None:
    if chardev.get("backend") != "socket" or not is_true(chardev.get("server")):
        return None
    if "fd" in chardev and re.fullmatch("[0-9]{1,9}", str(chardev["fd"])):
        return f"fd:{chardev['fd']}"
    path = chardev.get("path")
    return None if path is None else str(path)
