"""Cuts a byte stream into JSON objects and arrays, whatever stands between them.

QMP clients send commands without a newline, Firecracker sends an array and nothing else: the only
end of a value is its own.
"""

from __future__ import annotations

import json
import re

MAX_VALUE_BYTES = 1 << 18
MAX_DEPTH = 64
"""Python writes and prints a value by recursion, deeper in the stack than it was read; our messages
nest four deep."""
_OUTSIDE, _INSIDE = re.compile(rb'["{}\[\]]'), re.compile(rb'["\\]')
"""What matters outside and inside a string."""
_OPENS = {b"}": b"{", b"]": b"["}


class JsonSplitter:
    """feed() bytes, take() values.  ValueError from take() on what is not and cannot become JSON,
    or is longer than 256 KiB, or nested too deeply; nothing can be taken after it."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._seen = 0  # bytes of the value that were looked at
        self._open = b""  # its brackets that are not closed
        self._in_text = False

    def feed(self, data: bytes) -> None:
        self._raw += data

    def take(self) -> object | None:
        """The next complete value, None if there is none yet."""
        if not self._open:
            self._begin()
        end = self._end()
        if (end or len(self._raw)) > MAX_VALUE_BYTES:
            raise ValueError(f"a JSON value of more than {MAX_VALUE_BYTES} bytes")
        if end is None:
            return None
        try:
            value = _DECODER.decode(self._raw[:end].decode())
        except ValueError as error:
            raise self._no_json(str(error)) from None
        del self._raw[:end]
        self._seen = 0
        return value

    def _begin(self) -> None:
        self._raw = self._raw.lstrip(b" \t\r\n")
        if self._raw and self._raw[:1] not in (b"{", b"["):
            raise self._no_json("expected an object or an array")

    def _end(self) -> int | None:
        """Where the value ends; goes on where it stopped."""
        while mark := (_INSIDE if self._in_text else _OUTSIDE).search(self._raw, self._seen):
            self._seen = mark.end()
            if mark[0] == b"\\":
                self._seen += 1
            elif mark[0] == b'"':
                self._in_text = not self._in_text
            elif mark[0] in _OPENS:
                self._close(mark[0])
                if not self._open:
                    return self._seen
            else:
                self._open += mark[0]
                if len(self._open) > MAX_DEPTH:
                    raise ValueError(f"JSON nested too deeply: {self._shown()}")
        self._seen = max(self._seen, len(self._raw))
        return None

    def _close(self, bracket: bytes) -> None:
        if self._open[-1:] != _OPENS[bracket]:
            raise self._no_json("brackets that do not match")
        self._open = self._open[:-1]

    def _no_json(self, why: str) -> ValueError:
        return ValueError(f"not JSON, {why}: {self._shown()}")

    def _shown(self) -> str:
        return repr(self._raw[:60].decode("utf-8", "replace"))


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _finite(text: str) -> float:
    """What is too large for a float would be written back as Infinity."""
    value = float(text)
    if value in (float("inf"), -float("inf")):
        raise ValueError(f"{text} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
