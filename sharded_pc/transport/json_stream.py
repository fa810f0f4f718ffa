"""Cuts a byte stream into JSON values, whatever stands between them.

QMP clients send commands without a newline, Firecracker sends an array and nothing else: the only
end of a value is its own.
"""

from __future__ import annotations

import json

MAX_VALUE_BYTES = 1 << 18
_DECODER = json.JSONDecoder()
_LITERALS = ("true", "false", "null", "-")


class JsonSplitter:
    """feed() bytes, take() values.  ValueError from take() on what is not and cannot become JSON,
    or is longer than 256 KiB."""

    def __init__(self) -> None:
        self._raw = b""

    def feed(self, data: bytes) -> None:
        self._raw += data

    def take(self) -> object | None:
        """The next complete value, None if there is none yet."""
        text = self._raw.decode("utf-8", "replace").lstrip()
        if not text:
            return None
        try:
            value, end = _DECODER.raw_decode(text)
        except json.JSONDecodeError as error:
            if len(self._raw) > MAX_VALUE_BYTES:
                raise ValueError(f"a JSON value of more than {MAX_VALUE_BYTES} bytes") from None
            if not _may_go_on(text, error):
                raise ValueError(f"not JSON: {text[:60]!r}") from None
            return None
        except RecursionError:
            raise ValueError(f"JSON nested too deeply: {text[:60]!r}") from None
        self._raw = text[end:].encode()
        return value


def _may_go_on(text: str, error: json.JSONDecodeError) -> bool:
    rest = text[error.pos :]
    unfinished = any(literal.startswith(rest.strip()) for literal in _LITERALS)
    return unfinished or error.msg.startswith(("Unterminated", "Invalid \\u", "Invalid \\escape"))
