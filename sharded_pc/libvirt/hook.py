"""Puts our emulator into the XML of domains: libvirt's hook for incoming ones, KubeVirt's sidecar.

libvirt starts a copy of this file as ``qemu.d/sharded-pc NAME migrate begin -``, with the incoming
domain's XML on standard input, and takes what it prints for that domain, the old XML if it prints
nothing (libvirt.org/hooks.html).  KubeVirt's sidecar-shim starts it as ``onDefineDomain --vmi JSON
--domain XML`` and takes what it prints, in any case.

The file stands alone, with nothing but Python's library: it is copied to where hooks are, and it
must work when the package has gone.  No migration fails because of it: whatever it cannot read or
do ends with the domain as it was, exit code 0 and a line on stderr.

The rule is the emulator's own (emulator/settings.py): `guests` and `least-memory` of
``/etc/sharded-pc.toml``. Of its other keys only `qemu` is of interest here: what a domain gets that
comes with our emulator and is not chosen.  Without the file every domain is chosen.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import html
import json
import os
import re
import sys
import tomllib
from xml.parsers import expat

SETTINGS = "/etc/sharded-pc.toml"
EMULATOR = "/usr/bin/sharded-pc-emulator"
"""In the installed copy it is the one of the package that was installed from."""
QEMU = "qemu-system-x86_64"
ANNOTATION = "sharded-pc/emulator"
"""Of a VMI: another emulator than EMULATOR."""

UNITS = {"b": 1, "bytes": 1} | {
    unit: step**power
    for power, letter in enumerate("kmgt", 1)
    for unit, step in ((letter, 1024), (f"{letter}ib", 1024), (f"{letter}b", 1000))
}
"""libvirt's units of memory (libvirt.org/formatdomain.html), in lower case, in bytes."""
SUFFIXES = {letter: 1024**power for power, letter in enumerate("BKMGTPE")}
"""QEMU's, for least-memory."""


class Unusable(Exception):
    """Settings or a domain that cannot be read; the text is for the log."""


# --- the domain ---


class Domain:
    """What of a domain's XML, `text`, matters here; Unusable if it is none.

    The XML stays as it is but for one element: reading and writing it anew could change what others
    put there.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.kind = self.name = self.arch = ""
        self.emulator: str | None = None
        self.memory = 0
        """bytes"""
        self._unit, self._path, self._said = "KiB", [], []
        self._span: tuple[int, int] | None = None
        self._devices: int | None = None
        self._read()

    def with_emulator(self, path: str) -> bytes:
        element = f"<emulator>{html.escape(path)}</emulator>".encode()
        if self._span is None and self._devices is None:
            raise Unusable("the domain has no <devices>")
        start, end = self._span or (self._devices, self._devices)
        return self.text[:start] + element + self.text[end:]

    def _read(self) -> None:
        self._parser = parser = expat.ParserCreate()
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = lambda data: self._said.append(data)
        try:
            parser.Parse(self.text, True)
        except (expat.ExpatError, ValueError) as error:
            raise Unusable(f"no XML of a domain: {error}") from None
        if not self.kind:
            raise Unusable("no XML of a domain: the root is not <domain>")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        self._said = []
        match self._path:
            case ["domain"]:
                self.kind = attributes.get("type", "unknown")
            case ["domain", "memory"]:
                self._unit = attributes.get("unit", "KiB")
            case ["domain", "os", "type"]:
                self.arch = attributes.get("arch", "")
            case ["domain", "devices"]:
                self._devices = self._tag_end() if not self._empty() else None
            case ["domain", "devices", "emulator"]:
                self._span = (self._parser.CurrentByteIndex, 0)

    def _end(self, _name: str) -> None:
        said = "".join(self._said).strip()
        match self._path:
            case ["domain", "name"]:
                self.name = said
            case ["domain", "memory"]:
                self.memory = size(f"{said} {self._unit}")
            case ["domain", "devices", "emulator"]:
                assert self._span is not None
                self.emulator, self._span = said, (self._span[0], self._tag_end())
        self._path.pop()

    def _tag_end(self) -> int:
        """Behind the tag that the parser is at."""
        return self.text.index(b">", self._parser.CurrentByteIndex) + 1

    def _empty(self) -> bool:
        return self.text[: self._tag_end()].endswith(b"/>")


def size(text: str) -> int:
    """Bytes of libvirt's "64 GiB"; Unusable for anything else."""
    found = re.fullmatch(r"\s*([0-9]+)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].lower() not in UNITS:
        raise Unusable(f"{text!r} is no amount of memory")
    return int(found[1]) * UNITS[found[2].lower()]


# --- the rule ---


@dataclasses.dataclass(frozen=True)
class Rule:
    """`guests`: shell patterns of names; `least_memory`: bytes; `qemu`: a path."""

    guests: tuple[str, ...] = ("*",)
    least_memory: int = 0
    qemu: str = f"/usr/bin/{QEMU}"

    def chooses(self, domain: Domain) -> bool:
        """Only domains of QEMU on x86-64 can be received in shards."""
        return (
            domain.kind in ("kvm", "qemu")
            and domain.arch in ("x86_64", "")
            and domain.memory >= self.least_memory
            and any(fnmatch.fnmatchcase(domain.name, each) for each in self.guests)
        )


def read_rule(path: str = SETTINGS) -> Rule:
    """Unusable if the file cannot be read or says something else."""
    try:
        with open(path, "rb") as file:
            keys = tomllib.load(file)
    except FileNotFoundError:
        return Rule()
    except (OSError, ValueError) as error:
        raise Unusable(f"{path}: {error}") from None
    guests, qemu = keys.get("guests", ["*"]), keys.get("qemu", QEMU)
    if not isinstance(guests, list) or not all(isinstance(each, str) for each in guests):
        raise Unusable(f"{path}: guests must be a list of patterns")
    if not isinstance(qemu, str):
        raise Unusable(f"{path}: qemu must be a path")
    least = _suffixed(path, keys.get("least-memory", 0))
    return Rule(tuple(guests), least, os.path.join("/usr/bin", qemu))


def _suffixed(path: str, value: object) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([BKMGTPE]?)", str(value).strip().upper())
    if not found or isinstance(value, bool):
        raise Unusable(f"{path}: least-memory {value!r} is no size such as 64G")
    return int(float(found[1]) * SUFFIXES[found[2] or "B"])


def incoming(text: bytes, rule: Rule) -> bytes:
    """The XML to take instead of `text`; empty: that is as it should be."""
    domain = Domain(text)
    if rule.chooses(domain):
        if not os.access(EMULATOR, os.X_OK):
            raise Unusable(f"{domain.name} is to have {EMULATOR}, which is no executable here")
        return b"" if domain.emulator == EMULATOR else domain.with_emulator(EMULATOR)
    # It ran in shards where it comes from.
    if os.path.basename(domain.emulator or "") == os.path.basename(EMULATOR):
        return domain.with_emulator(rule.qemu)
    return b""


# --- who calls ---


def of_libvirt(words: list[str]) -> bytes:
    text = sys.stdin.buffer.read()  # in any case: libvirt writes it
    return incoming(text, read_rule()) if words[1:3] == ["migrate", "begin"] else b""


def of_kubevirt(words: list[str]) -> bytes:
    """A VMI that asks for the sidecar wants the emulator; its RAM is the launcher's concern."""
    options = dict(zip(words[::2], words[1::2], strict=False))
    text = os.fsencode(options.get("--domain", ""))
    try:
        annotations = json.loads(options.get("--vmi", "{}"))["metadata"].get("annotations") or {}
        return Domain(text).with_emulator(annotations.get(ANNOTATION, EMULATOR))
    except (Unusable, ValueError, LookupError, TypeError, AttributeError) as error:
        complain(error)
        return text


def complain(error: Exception) -> None:
    print(f"sharded-pc hook: domain left as it is: {error}", file=sys.stderr)


def main(words: list[str]) -> int:
    try:
        new = of_kubevirt(words) if "--domain" in words else of_libvirt(words)
        sys.stdout.buffer.write(new)
        sys.stdout.buffer.flush()
    except (Unusable, OSError) as error:
        complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
