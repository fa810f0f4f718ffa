"""A stream as StreamReader reads it, but nothing is refused that has a meaning.

Device state has no length in the stream, but a footer behind it: what stands before is told as
opaque.  A package is read like the stream around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from sharded_pc.dump import wishes
from sharded_pc.dump.wishes import BEGIN, Ahead, Footer, Skip
from sharded_pc.errors import RemoteProtocolError, StreamEnded
from sharded_pc.wire import commands, events, package
from sharded_pc.wire import constants as c
from sharded_pc.wire.constants import Cmd, Section
from sharded_pc.wire.reader import StreamReader, section_head, subsection
from sharded_pc.wire.steps import TELL, Parser, number

RAM = "ram"


class Header:
    """Magic and version were right."""


class PackageEnd:
    """What came since Packaged was the package."""


class OtherCommand:
    """A command that no receiver of ours obeys."""

    def __init__(self, number: int, payload: bytes) -> None:
        self.number, self.payload = number, payload


class SectionOf:
    """Which section is read, and whose it is."""

    def __init__(self, kind: Section, section: int, name: str | None) -> None:
        self.kind, self.section, self.name = kind, section, name


class Opaque:
    """So many bytes that only a device understands."""

    def __init__(self, size: int, *, footer: bool) -> None:
        self.size, self.footer = size, footer


class Explained(StreamReader):
    """`sections`: names by their number, of those that go on."""

    def __init__(self, records: Callable[[], Parser]) -> None:
        super().__init__(records)
        self.sections: dict[int, str] = {}
        self.capabilities: tuple[str, ...] = ()
        self._package_end: int | None = None

    @property
    def in_package(self) -> bool:
        return self._package_end is not None

    def events(self) -> Parser:
        yield BEGIN
        yield from self._header()
        yield Header()
        yield from self._sections()
        yield from self._description()

    def recovery(self) -> Parser:
        """A recovery's stream: without a header, and the only section is RAM's."""
        yield from self._sections()
        yield from self._description()

    def _section(self) -> Parser:
        yield BEGIN
        if not (yield Ahead(1)):
            raise StreamEnded("the stream ends without EOF", offset=(yield TELL))
        return (yield from super()._section())

    # Configuration and commands

    def _configured(self) -> Parser:
        told = yield from subsection()
        self.capabilities += told.capabilities
        yield told

    def _command(self) -> Parser:
        cmd = yield from number(2)
        size = yield from number(2)
        payload = bytes((yield size)) if size else b""
        if cmd in _OBEYED:
            event = commands.meaning(commands.known(cmd, size), payload)
        else:
            event = OtherCommand(cmd, payload)
        yield event
        if isinstance(event, events.Packaged):
            yield from self._packaged(event.length)

    def _packaged(self, length: int) -> Parser:
        if self._package_end is not None:
            raise RemoteProtocolError("a package inside a package")
        end = self._package_end = (yield TELL) + length
        while (at := (yield TELL)) < end:
            if (yield Ahead(1)) in _NO_SECTION:
                yield from self._unknown(end - at)
            elif (yield from self._section()):
                raise RemoteProtocolError(f"EOF inside a package of {length} bytes", offset=at)
        if at > end:
            raise RemoteProtocolError(
                f"the last message in a package of {length} bytes goes {at - end} bytes beyond it",
                offset=end,
            )
        self._package_end = None
        yield PackageEnd()

    def _unknown(self, left: int) -> Parser:
        """No section of QEMU's: but the commands at the end can be told, and come next."""
        skipped = max(left - wishes.TAIL, 0)
        yield BEGIN
        yield Skip(skipped)
        rest = yield Ahead(left - skipped)
        if len(rest) < left - skipped:
            yield left - skipped  # ends it
        if not rest.endswith(package.RUN):
            raise RemoteProtocolError(
                f"a package that ends with {rest[-5:].hex()}, expected POSTCOPY_RUN"
            )
        devices = package.parse(package.LISTEN + rest)[1].data
        yield Skip(len(devices))
        yield Opaque(skipped + len(devices), footer=False)

    # Sections

    def _start(self) -> Parser:
        head = yield from section_head()
        self.sections[head.section] = head.name
        yield SectionOf(Section.START, head.section, head.name)
        yield head
        yield from self._content(Section.START, head.section)

    def _more(self, kind: Section) -> Parser:
        section = yield from number(4)
        name = self.sections.get(section)
        yield SectionOf(kind, section, name)
        yield from self._content(kind, section)

    def _content(self, kind: Section, section: int) -> Parser:
        if self.sections.get(section, RAM) == RAM:
            self._ram_id = section
            yield from self._ram_section(kind)
        else:
            yield from self._device(section)

    def _devices(self, kind: int) -> Parser:
        head = yield from section_head()
        yield SectionOf(Section.FULL, head.section, head.name)
        yield head
        yield from self._device(head.section)
        return False

    def _device(self, section: int) -> Parser:
        """Up to its footer, and that."""
        at = yield TELL
        left = None if self._package_end is None else self._package_end - at
        size = yield Footer(section, left)
        if size is not None:
            yield Skip(5)
            yield Opaque(size, footer=True)
        elif self._package_end is None:
            raise StreamEnded(
                f"the end of a device's state was not found: no footer of section {section}",
                offset=at,
            )
        else:
            yield from self._unknown(self._package_end - (yield TELL))

    # The end

    def _description(self) -> Parser:
        if (yield Ahead(1)) == bytes([Section.VMDESCRIPTION]):
            yield BEGIN
            yield 1
            size = yield from number(4)
            if size > c.MAX_DESCRIPTION_BYTES:
                raise RemoteProtocolError(
                    f"VMDESCRIPTION of {size} bytes, expected at most {c.MAX_DESCRIPTION_BYTES}"
                )
            yield events.VmDescription(_checked((yield size) if size else b"", (yield TELL)))
        if (yield Ahead(1)):
            raise RemoteProtocolError("bytes behind the stream's end", offset=(yield TELL))


_OBEYED = set(Cmd) - {Cmd.ENABLE_COLO}
_NO_SECTION = [bytes([n]) for n in range(256) if n not in set(Section) - {Section.FOOTER}]


def _checked(raw: bytes, end: int) -> bytes:
    try:
        json.loads(raw.rstrip(b"\0"))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(
            f"VMDESCRIPTION that is no JSON ({error})", offset=end - len(raw)
        ) from None
    return raw


def channel_records(records: Callable[[], Parser]) -> Parser:
    """A postcopy-preempt channel: records without sections, in QEMU 7.2 with EOS at the end."""
    while (yield Ahead(1)):
        yield BEGIN
        yield from records()
