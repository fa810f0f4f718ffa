"""The options of a command line that matter here, with their places in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from sharded_pc.errors import UsageError
from sharded_pc.qemu_args.syntax import Pair, read_pairs

_IMPLIED = {
    "-m": "size",
    "-machine": "type",
    "-object": "qom-type",
    "-numa": "type",
    "-device": "driver",
    "-netdev": "type",
    "-nic": "type",
    "-net": "type",
    "-blockdev": "",
    "-chardev": "backend",
    "-drive": "",
    "-global": "",
    "-incoming": "",
    "-overcommit": "",
    "-run-with": "",
    "-name": "guest",
    "-mon": "chardev",
    "-qmp": "",
    "-qmp-pretty": "",
}
"""Options whose value is looked at, with the key of a first word that has none."""
_ALIASES = {"-M": "-machine"}
_PROGRAM = re.compile(r"qemu-system-[^=]+|qemu-kvm|kvm")
_FREE = ("-accel", "-append", "-kernel", "-L", "-name")  # of these, -name is looked at
"""Options of QEMU whose value may look like its program, or like an option."""


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    name: str
    """with one dash, `-machine` for `-M`"""
    at: int
    """its value's place in the command line; its own if it has none that matters"""
    text: str
    """the value as it was written; the word itself if it has none that matters"""

    def pairs(self) -> list[Pair]:
        return read_pairs(self.text, _IMPLIED[self.name])

    def values(self) -> dict[str, Any]:
        return dict(self.pairs())


def option_name(word: str) -> str:
    """QEMU takes one dash or two."""
    name = word[1:] if word.startswith("--") else word
    return _ALIASES.get(name, name)


def find_program(arguments: Sequence[str]) -> int:
    """Where QEMU stands: what is before it is a wrapper's (`numactl -m 0 qemu-system-x86_64`).
    0 if no word looks like it."""
    for index, word in enumerate(arguments):
        value = index and option_name(arguments[index - 1]) in _FREE
        if _PROGRAM.fullmatch(word.rpartition("/")[2]) and not value:
            return index
    return 0


class CommandLine:
    """A wrapper's words, QEMU and its options.  UsageError if there is no program."""

    def __init__(self, arguments: Sequence[str]) -> None:
        if not arguments:
            raise UsageError("no QEMU given: sharded-pc run INCOMING -- qemu-system-x86_64 ARGS")
        self.arguments = tuple(arguments)
        self.options = self._read(find_program(arguments) + 1)

    def _read(self, at: int) -> list[Option]:
        out, words = [], self.arguments
        while at < len(words):
            word, name = words[at], option_name(words[at])
            at += name in _IMPLIED or name in _FREE  # the value is no option
            if name.startswith("-") and at < len(words):
                out.append(Option(name, at, words[at] if name in _IMPLIED else word))
            at += 1
        return out

    def named(self, *names: str) -> list[Option]:
        return [option for option in self.options if option.name in names]

    def merged(self, name: str) -> dict[str, Any]:
        """`-m` and `-machine` may stand there more than once: the last word on each key."""
        out: dict[str, Any] = {}
        for option in self.named(name):
            out.update(option.values())
        return out
