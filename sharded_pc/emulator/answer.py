"""The answer to emulator.c: texts that end with NUL, whose first byte says what they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping


def become(arguments: Iterable[str], environment: Mapping[str, str]) -> bytes:
    """QEMU's arguments, its program first, and what is added to its environment."""
    words = [f"e{name}={value}" for name, value in environment.items()]
    words += [f"a{word}" for word in arguments]
    return _texts([*words, "."])


def stand_aside(why: str) -> bytes:
    """No receiver serves this guest."""
    return _texts([f"m{why}", "."])


def _texts(words: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(word) + b"\0" for word in words)


def send(fd: int, answer: bytes) -> None:
    """And closes it; who is gone needs no answer."""
    with contextlib.suppress(OSError):
        left = memoryview(answer)
        while left:
            left = left[os.write(fd, left) :]
    with contextlib.suppress(OSError):
        os.close(fd)
