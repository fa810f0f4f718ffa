"""The stream as a whole (QEMU migration/savevm.c): header, configuration, sections, commands.

The stream is not self-delimiting: a device's section (FULL) carries no length.  What can be read is
`ram` sections, commands, a package as bytes, and, when a migration completes in precopy, the device
state as everything up to a VMDESCRIPTION that is valid JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from sharded_pc.errors import RemoteProtocolError, StreamEnded
from sharded_pc.wire import constants as c
from sharded_pc.wire import events, package
from sharded_pc.wire.commands import command
from sharded_pc.wire.constants import Section
from sharded_pc.wire.steps import TELL, Parser, Some, counted_text, number, text

_KINDS = {Section.START: "setup", Section.PART: "part", Section.END: "end"}
_RECOVERY = {events.RecvBitmap: "RECV_BITMAP", events.PostcopyResume: "POSTCOPY_RESUME"}
_REMEDIES = {
    "dirty-bitmap": "turn the source's dirty-bitmaps capability off",
    "block": "turn the source's block capability off, storage is migrated apart",
    "vfio": "unplug that passed-through device at the source before the migration",
    "virtio-mem-device-early": "the memory it has plugged is not in the stream; use pc-dimm at the "
    "source",
}
"""Sections that a guest's owner can do without."""
_REFUSED_CAPABILITIES = {
    "x-ignore-shared": "its shared blocks would not be sent",
    "mapped-ram": "its pages are not in the stream",
}


class StreamReader:
    """Parses one stream.  `records` gives the parser of a ram section's records through EOS."""

    def __init__(self, records: Callable[[], Parser]) -> None:
        self._records = records
        self._ram_id: int | None = None
        self._ram_over = False
        self.page_sizes: int | None = None
        """of the source's RAM, their bitwise OR; None before POSTCOPY_ADVISE"""
        self.switched = False
        """a package has come"""

    def events(self) -> Parser:
        """All events of the stream; returns after EOF (and VMDESCRIPTION, if one follows)."""
        yield from self._header()
        yield from self._sections()

    def resumed_events(self, ram_id: int) -> Parser:
        """All events of a recovery's stream: no header, the section `ram_id` of RAM goes on."""
        self._ram_id = ram_id
        yield from self._handshake()
        yield from self._sections()

    @property
    def ram_id(self) -> int | None:
        """The number of the RAM's section, None before it was said."""
        return self._ram_id

    def _sections(self) -> Parser:
        while True:
            at = yield TELL
            try:
                done = yield from self._section()
            except RemoteProtocolError as error:
                error.offset = at if error.offset is None else error.offset
                raise
            if done:
                return

    def _header(self) -> Parser:
        magic = yield from number(4)
        if magic != c.FILE_MAGIC:
            raise RemoteProtocolError(
                f"not a migration stream: magic {magic:#010x}, expected {c.FILE_MAGIC:#010x}",
                offset=0,
            )
        version = yield from number(4)
        if version != c.FILE_VERSION:
            raise RemoteProtocolError(
                f"stream version {version}, expected {c.FILE_VERSION}", offset=4
            )

    def _handshake(self) -> Parser:
        """RECV_BITMAP for each block, POSTCOPY_RESUME (QEMU migration/migration.c
        postcopy_do_resume)."""
        while True:
            at = yield TELL
            kind = yield from number(1)
            event = (yield from command()) if kind == Section.COMMAND else None
            if type(event) not in _RECOVERY:
                what = f"section type {kind:#04x}" if event is None else type(event).__name__
                raise RemoteProtocolError(
                    f"{what} where a recovery begins, expected RECV_BITMAP or POSTCOPY_RESUME",
                    offset=at,
                )
            yield event
            if isinstance(event, events.PostcopyResume):
                return

    def _section(self) -> Parser:
        kind = yield from number(1)
        match kind:
            case Section.CONFIGURATION:
                yield (yield from _configuration())
            case Section.SUBSECTION:
                yield from self._configured()
            case Section.COMMAND:
                yield from self._command()
            case Section.START:
                yield from self._start()
            case Section.PART | Section.END:
                yield from self._more(Section(kind))
            case Section.FULL:
                return (yield from self._devices(kind))
            case Section.EOF:
                yield events.Eof()
                return True
            case _:
                raise RemoteProtocolError(f"unknown section type {kind:#04x}")
        return False

    def _configured(self) -> Parser:
        told = yield from subsection()
        bits = told.target_page_bits
        if bits not in (None, c.TARGET_PAGE_BITS):
            raise RemoteProtocolError(
                f"target pages of 2^{bits} bytes, expected 2^{c.TARGET_PAGE_BITS}"
            )
        for name in told.capabilities:
            if why := _REFUSED_CAPABILITIES.get(name):
                raise RemoteProtocolError(
                    f"the source uses capability {name!r}: {why}; turn it off"
                )

    def _command(self) -> Parser:
        event = yield from command()
        if isinstance(event, events.PostcopyListen | events.PostcopyRun):
            raise RemoteProtocolError(f"{type(event).__name__} outside a package")
        if type(event) in _RECOVERY:
            raise RemoteProtocolError(
                f"{_RECOVERY[type(event)]}: the source asks for a recovery of a paused migration, "
                f"which this receiver is not in"
            )
        yield event
        if isinstance(event, events.PostcopyAdvise):
            self.page_sizes = event.page_sizes
        if isinstance(event, events.Packaged):
            yield from package.parse((yield from _package(event.length)))
            self.switched = True

    def _start(self) -> Parser:
        head = yield from section_head()
        version = head.version
        if head.name != "ram":
            raise RemoteProtocolError(
                f"section of device {head.name!r} (instance {head.instance}) cannot be skipped: "
                f"its length is not in the stream; {_remedy(head.name)}"
            )
        if version != c.RAM_SECTION_VERSION or self._ram_id is not None:
            why = "a second time" if self._ram_id is not None else f"with version {version}"
            raise RemoteProtocolError(
                f"section 'ram' {why}, expected one of version {c.RAM_SECTION_VERSION}"
            )
        self._ram_id = head.section
        yield from self._ram_section(Section.START)

    def _more(self, kind: Section) -> Parser:
        section = yield from number(4)
        if section != self._ram_id:
            raise RemoteProtocolError(
                f"{kind.name} of unknown section {section} (only 'ram' sections can be read)"
            )
        if self._ram_over:
            raise RemoteProtocolError(f"{kind.name} of section 'ram' after its END")
        yield from self._ram_section(kind)
        self._ram_over = kind is Section.END

    def _ram_section(self, kind: Section) -> Parser:
        yield events.RamSection(_KINDS[kind])
        yield from self._records()
        mark = yield from number(1)
        if mark != Section.FOOTER:
            raise RemoteProtocolError(f"section 'ram' ends with {mark:#04x}, expected a footer")
        section = yield from number(4)
        if section != self._ram_id:
            raise RemoteProtocolError(f"footer of section {section}, expected {self._ram_id}")
        yield events.RamSectionEnd(_KINDS[kind])

    def _devices(self, kind: int) -> Parser:
        if not self._ram_over:
            section = yield from number(4)
            name = yield from counted_text("section")
            raise RemoteProtocolError(
                f"state of device {name!r} (section {section}) before the end of RAM cannot be "
                f"skipped: its length is not in the stream; {_remedy(name)}"
            )
        devices, description = yield from _until_description(bytes([kind]))
        yield events.Devices(devices)
        yield events.Eof()
        if description is not None:
            yield events.VmDescription(description)
        return True


def _remedy(name: str) -> str:
    """`name` is a section's, behind the device's path: 0000:00:02.0/vfio."""
    return _REMEDIES.get(name.rpartition("/")[2], "start the source without that device")


def _configuration() -> Parser:
    size = yield from number(4)
    if not 0 < size <= c.MAX_NAME_BYTES:
        raise RemoteProtocolError(f"machine name of {size} bytes, expected 1..{c.MAX_NAME_BYTES}")
    return events.Configuration(text((yield size)))


def section_head() -> Parser:
    """What stands in a START or FULL section before its content."""
    section = yield from number(4)
    name = yield from counted_text("section")
    instance = yield from number(4)
    return events.SectionHead(section, name, instance, (yield from number(4)))


def subsection() -> Parser:
    """One subsection of the configuration."""
    name = yield from counted_text("subsection")
    version = yield from number(4)
    match name:
        case "configuration/target-page-bits":
            return events.Subsection(name, version, target_page_bits=(yield from number(4)))
        case "configuration/capabilities":
            return events.Subsection(name, version, capabilities=(yield from _capabilities()))
        case "configuration/uuid":
            return events.Subsection(name, version, uuid=bytes((yield 16)))
    raise RemoteProtocolError(f"unknown subsection {name!r}")


def _capabilities() -> Parser:
    count = yield from number(4)
    if count > c.MAX_CAPABILITIES:
        raise RemoteProtocolError(f"{count} capabilities, expected at most {c.MAX_CAPABILITIES}")
    names = []
    for _ in range(count):
        names.append((yield from counted_text("capability")))
    return tuple(names)


def _package(length: int) -> Parser:
    if length > c.MAX_PACKAGE_BYTES:
        raise RemoteProtocolError(
            f"package of {length} bytes, expected at most {c.MAX_PACKAGE_BYTES}"
        )
    blob = bytearray()
    while len(blob) < length:
        piece = yield Some(length - len(blob))
        if not piece:
            missing = f"{length - len(blob)} bytes of {length} missing"
            raise StreamEnded(f"the stream ended inside a package, {missing}", offset=(yield TELL))
        blob += piece
    return bytes(blob)


class _Descriptions:
    """Where an EOF and a VMDESCRIPTION may stand in device state, by the place at which its JSON
    would end.  Every byte is looked at once, however the stream comes."""

    def __init__(self) -> None:
        self._looked = 0
        self._by_end: dict[int, list[int]] = {}

    def look(self, seen: bytearray) -> None:
        """At what has come; RemoteProtocolError if it is made to be looked at for ever."""
        at = self._looked
        while (at := seen.find(b"\x00\x06", at)) >= 0 and at + 7 <= len(seen):
            size = int.from_bytes(seen[at + 2 : at + 6], "big")
            if size <= c.MAX_DESCRIPTION_BYTES and seen[at + 6] == 0x7B:
                self._by_end.setdefault(at + 6 + size, []).append(at)
            at += 1
        self._looked = at if at >= 0 else max(len(seen) - 1, 0)
        self._by_end = {end: at for end, at in self._by_end.items() if end >= len(seen)}
        if sum(map(len, self._by_end.values())) > c.MAX_DESCRIPTIONS:
            raise RemoteProtocolError(
                f"device state with more than {c.MAX_DESCRIPTIONS} beginnings of a VMDESCRIPTION"
            )

    def ending(self, seen: bytearray) -> tuple[int, int] | None:
        """(EOF's place, JSON's) of the first that is complete now."""
        for at in self._by_end.get(len(seen), ()):
            if _is_json(seen[at + 6 :]):
                return at, at + 6
        return None


def _is_json(raw: bytearray) -> bool:
    try:
        return isinstance(json.loads(raw.rstrip(b"\0")), dict)
    except (ValueError, RecursionError):  # deeper than a description nests: device state
        return False


def _until_description(tail: bytes) -> Parser:
    """Everything up to EOF and VMDESCRIPTION; without one, up to the end of the stream if what
    stands there is a device's footer and EOF.  Only the last description in the bytes can be the
    stream's."""
    seen, descriptions = bytearray(tail), _Descriptions()
    while True:
        more = yield Some(1 << 20)
        if not more:
            if _ends_whole(seen):
                return bytes(seen[:-1]), None
            raise StreamEnded("the stream ended inside device state", offset=(yield TELL))
        seen += more
        if len(seen) > c.MAX_DEVICES_BYTES:
            raise RemoteProtocolError(
                f"more than {c.MAX_DEVICES_BYTES} bytes of device state after RAM"
            )
        descriptions.look(seen)
        if (found := descriptions.ending(seen)) is not None:
            end, body = found
            return bytes(seen[:end]), bytes(seen[body:])


def _ends_whole(seen: bytearray) -> bool:
    """Whether the last bytes are EOF behind the footer of a section that began in `seen`: a zero
    byte alone may be any byte of a device's state."""
    footer, section, end = seen[-6:-5], seen[-5:-1], seen[-1:]
    return footer == b"\x7e" and end == b"\0" and b"\x04" + section in seen
