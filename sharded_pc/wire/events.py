"""What a stream says, as frozen values.  Offsets and lengths are bytes."""

from __future__ import annotations

import dataclasses

from sharded_pc.geometry import RamBlock


@dataclasses.dataclass(frozen=True, slots=True)
class Configuration:
    """The source's machine type."""

    machine: str


@dataclasses.dataclass(frozen=True, slots=True)
class Subsection:
    """Of the configuration (not told by StreamReader, which checks it)."""

    name: str
    version: int
    target_page_bits: int | None = None
    capabilities: tuple[str, ...] = ()
    uuid: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SectionHead:
    """What a START or FULL section begins with (StreamReader does not tell it)."""

    section: int
    name: str
    instance: int
    version: int


@dataclasses.dataclass(frozen=True, slots=True)
class RamSection:
    """A `ram` section begins; its records follow."""

    kind: str
    """'setup', 'part' or 'end'"""


@dataclasses.dataclass(frozen=True, slots=True)
class RamBlocks:
    """The block list of the setup section."""

    blocks: tuple[RamBlock, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class RamPage:
    """One page of data (reference reader only: in C no event is made of it)."""

    block: str
    offset: int
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class RamZeroPage:
    """One page of zeros (reference reader only)."""

    block: str
    offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class RamXbzrle:
    """A page's difference to what stands there (reference reader only): xbzrle.patched()."""

    block: str
    offset: int
    encoded: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class MultifdFlush:
    """The channels of multifd synchronise here."""


@dataclasses.dataclass(frozen=True, slots=True)
class RamSectionEnd:
    """EOS and footer of a `ram` section were seen."""

    kind: str


@dataclasses.dataclass(frozen=True, slots=True)
class OpenReturnPath:
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class Ping:
    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class PostcopyAdvise:
    """`page_sizes` is the bitwise OR of all block page sizes; both None: postcopy of dirty bitmaps
    only."""

    page_sizes: int | None
    target_page_size: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class RamDiscard:
    block: str
    ranges: tuple[tuple[int, int], ...]
    """(start, length) pairs"""


@dataclasses.dataclass(frozen=True, slots=True)
class Packaged:
    """The package's size is known, its content is read next."""

    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class PostcopyListen:
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class PackagedDevices:
    """Device state inside a package, opaque."""

    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class PostcopyRun:
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class SwitchoverStart:
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class RecvBitmap:
    """Recovery: the source wants to know which pages of a block are here."""

    block: str


@dataclasses.dataclass(frozen=True, slots=True)
class PostcopyResume:
    """Recovery: the source has all bitmaps, and pages follow."""


@dataclasses.dataclass(frozen=True, slots=True)
class Devices:
    """Device state after RAM in a migration that completes in precopy, opaque."""

    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Eof:
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class VmDescription:
    json: bytes
