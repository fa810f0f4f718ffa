"""How QEMU writes an option's value: `pc,size=1,file=a,,b` or JSON, with sizes and booleans."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from sharded_pc.errors import UsageError

Pair = tuple[str, Any]
"""A key and its value: text, or what JSON made of it.  A key may stand there more than once
(`host-nodes=0,host-nodes=2` is a list)."""

MAX_DEPTH = 256
"""A block device with its backing files nests deepest; what looks at values recurses."""
MOST_BYTES = (1 << 63) - 1
"""QEMU's sizes are 64 bits, a file's are signed."""
_ITEM = re.compile(r"((?:[^,]|,,)*)(?:,|$)")  # a comma within a value is doubled
_UNITS = {unit: 1 << 10 * power for power, unit in enumerate("BKMGTPE")}


def is_json(text: str) -> bool:
    """As QEMU decides it."""
    return text.startswith("{")


def read_pairs(text: str, implied: str = "") -> list[Pair]:
    """'a,b=c,d' -> [(implied, 'a'), ('b', 'c'), ('d', 'on')]; UsageError if it is broken JSON.

    `implied` is the key of a first word that has none ("" if the option has no such key)."""
    if is_json(text):
        return _read_json(text)
    items = [match[1].replace(",,", ",") for match in _ITEM.finditer(text) if match[0]]
    pairs: list[Pair] = []
    for index, item in enumerate(items):
        key, equals, value = item.partition("=")
        if equals:
            pairs.append((key, value))
        elif index == 0 and implied:
            pairs.append((implied, item))
        else:
            pairs.append((item[2:], "off") if item.startswith("no") else (item, "on"))
    return pairs


def _read_json(text: str) -> list[Pair]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"QEMU option value {text[:60]!r} is not JSON: {error}") from None
    except RecursionError:
        value = None
    if value is None or _is_deeper(value, MAX_DEPTH):
        raise UsageError(f"QEMU option value {text[:60]!r} is nested more than {MAX_DEPTH} deep")
    return list(value.items())


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    return bool(level)


def write_pairs(pairs: Sequence[Pair], implied: str, as_json: bool) -> str:
    """The inverse of read_pairs; `implied` may only be the first pair's key."""
    if as_json:
        return json.dumps(dict(pairs), separators=(",", ":"))
    texts = [(key, _keyval(value).replace(",", ",,")) for key, value in pairs]
    return ",".join(text if key == implied else f"{key}={text}" for key, text in texts)


def _keyval(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value}B" if isinstance(value, int) else str(value)


def is_true(value: object) -> bool:
    """QEMU's words for it (qapi-util.c, qapi_bool_parse), which knows no capitals."""
    return value is True or value in ("on", "yes", "true", "y")


def size_bytes(value: object, unit: str) -> int:
    """QEMU's size: a number of `unit` ("M" for -m, "B" for objects), or with a suffix of its own;
    UsageError."""
    text = str(value)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([BKMGTPE]?)", text.strip().upper())
    size: float = -1
    if match:
        size = float(match[1]) * _UNITS[match[2] or unit]
    elif re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
        size = int(text, 16) * _UNITS[unit]
    if not 0 <= size <= MOST_BYTES:
        raise UsageError(f"memory size {text!r}: expected a number such as 512, 512M or 4G")
    return int(size)
