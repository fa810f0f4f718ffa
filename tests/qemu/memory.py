"""The RAMBlocks of a stopped QEMU, byte for byte, to compare with what a receiver has.

The bytes are read from ``/proc/<pid>/mem``: unlike ``pmemsave`` that shows every block, also the
ROM blobs that no guest-physical address reaches and the RAM under the legacy VGA hole. The host
address of a block comes from, in this order:

1. ``info ramblock``, which has a column HVA in newer QEMUs (10.0; not in 7.2);
2. ``gpa2hva`` of a guest-physical address at which ``info mtree -f`` shows the block;
3. its length among QEMU's don't-fork mappings (``dc`` in smaps). QEMU marks its RAMBlocks so and
   nothing else, and keeps a guard page after each, hence one mapping is one block, whole. Two
   blocks of one length that neither 1 nor 2 tells apart have several ``candidates`` each;
   for them there is only ``contains``.

Lengths, offsets and addresses are bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.qemu.vm import QemuVm

_CHUNK = 1 << 20  # compared at once before looking for the page
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class BlockMemory:
    """A RAMBlock in a QEMU process; ``length`` is its used length, which is what migrates."""

    name: str
    length: int
    page_size: int
    pid: int
    candidates: tuple[int, ...]

    @property
    def host_address(self) -> int:
        """Where it is mapped in the process; ``LookupError`` if that is not known for certain."""
        if len(self.candidates) != 1:
            raise LookupError(f"{self.name} may be at any of {list(map(hex, self.candidates))}")
        return self.candidates[0]

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Its bytes, to the end by default; ``LookupError`` as ``host_address``."""
        length = self.length - offset if length is None else length
        return _read_process(self.pid, self.host_address + offset, length)

    def contains(self, content: bytes) -> bool:
        """Whether ``content`` is the whole block: whether one of the candidates equals it."""
        return content in self.possible_contents()

    def possible_contents(self) -> Iterator[bytes]:
        """The bytes of each candidate."""
        return (_read_process(self.pid, address, self.length) for address in self.candidates)


@dataclass(frozen=True)
class GuestRange:
    """Part of a memory region as the guest's CPUs see it now."""

    address: int
    length: int
    region: str
    offset: int


@dataclass(frozen=True)
class _ListedBlock:
    """A line of ``info ramblock``; ``host_address`` 0 if this QEMU does not tell."""

    name: str
    page_size: int
    used: int
    total: int
    host_address: int


def blocks(vm: QemuVm) -> dict[str, BlockMemory]:
    """Every RAMBlock of ``vm`` by its name on the wire. Stop the VM before reading them."""
    listed = list(_list_blocks(vm))
    addresses = _find_addresses(vm, listed)
    return {
        block.name: BlockMemory(
            block.name, block.used, block.page_size, vm.pid, tuple(addresses[block.name])
        )
        for block in listed
    }


def differences(vm: QemuVm, received: Mapping[str, bytes]) -> dict[str, list[int]]:
    """{name: numbers of the 4 KiB pages that differ} of the blocks in ``received`` that differ.

    Empty means that all are equal. A block that could be at several addresses is taken to be
    where it differs least. ``KeyError`` for a block that ``vm`` does not have.
    """
    ours, found = blocks(vm), {}
    for name, content in received.items():
        pages = [differing_pages(mine, content) for mine in ours[name].possible_contents()]
        if fewest := min(pages, key=len):
            found[name] = fewest
    return found


def differing_pages(a: bytes, b: bytes, page_size: int = 4096) -> list[int]:
    """Indexes of the pages in which ``a`` and ``b`` differ, ascending.

    Any buffers of bytes will do. A page that only one of them has, or has in part, differs.
    """
    left, right, length = memoryview(a), memoryview(b), max(len(a), len(b))
    chunk = max(_CHUNK // page_size, 1) * page_size

    def differ(start: int, size: int) -> bool:
        return left[start : start + size] != right[start : start + size]

    unequal = [start for start in range(0, length, chunk) if differ(start, chunk)]
    pages = [at for start in unequal for at in range(start, start + chunk, page_size)]
    return [at // page_size for at in pages if differ(at, page_size)]


def pmemsave(vm: QemuVm, address: int, length: int) -> bytes:
    """Guest-physical memory as QEMU's ``pmemsave`` gives it: zeros where there is no RAM."""
    path = vm.folder / f"{vm.name}.pmemsave"
    vm.qmp("pmemsave", val=address, size=length, filename=str(path))
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def guest_ranges(vm: QemuVm) -> list[GuestRange]:
    """All RAM and ROM in the guest's address space, ascending; holes are left out."""
    views = re.split(r"^FlatView #", vm.hmp("info mtree -f"), flags=re.MULTILINE)
    view = next(view for view in views if 'AS "memory",' in view)
    span, kind = r"([0-9a-f]{16})-([0-9a-f]{16})", r"\(prio -?\d+, (?:ram|rom|romd)\)"
    line = rf"^\s+{span} {kind}: (\S+)(?: @([0-9a-f]+))?"
    return [
        GuestRange(int(first, 16), int(last, 16) + 1 - int(first, 16), name, int(offset or "0", 16))
        for first, last, name, offset in re.findall(line, view, re.MULTILINE)
    ]


def _list_blocks(vm: QemuVm) -> Iterator[_ListedBlock]:
    line = r"^\s*(\S.*?)\s+(\d+) (B|KiB|MiB|GiB)\s+(0x\w+)\s+(0x\w+)\s+(0x\w+)(?:\s+(0x\w+))?"
    for match in re.finditer(line, vm.hmp("info ramblock"), re.MULTILINE):
        name, size, unit, _offset, used, total, address = match.groups()
        page_size = int(size) * _UNITS[unit]
        yield _ListedBlock(name, page_size, int(used, 16), int(total, 16), int(address or "0", 16))


def _find_addresses(vm: QemuVm, listed: list[_ListedBlock]) -> dict[str, list[int]]:
    """{block name: its host address, or all it may be at}."""
    if all(block.host_address for block in listed):
        return {block.name: [block.host_address] for block in listed}
    known = _mapped_addresses(vm, listed)
    taken = set(known.values())
    free = [mapping for mapping in _dont_fork_mappings(vm.pid) if mapping[0] not in taken]
    found = {block.name: _fitting(block, free) for block in listed}
    return {**found, **{name: [address] for name, address in known.items()}}


def _fitting(block: _ListedBlock, mappings: list[tuple[int, int]]) -> list[int]:
    size = -(-block.total // block.page_size) * block.page_size
    return [start for start, length in mappings if length == size]


def _mapped_addresses(vm: QemuVm, listed: list[_ListedBlock]) -> dict[str, int]:
    """{block name: host address} of the blocks that the guest's address space shows somewhere."""
    known: dict[str, int] = {}
    for part in guest_ranges(vm):
        # a block's name is its region's, after the device path if it belongs to a device
        names = [b.name for b in listed if b.name.rpartition("/")[2] == part.region]
        if len(names) == 1 and names[0] not in known:
            known[names[0]] = _host_address(vm, part.address) - part.offset
    return known


def _host_address(vm: QemuVm, guest_address: int) -> int:
    answer = vm.hmp(f"gpa2hva {guest_address:#x}")
    match = re.search(r" is (0x[0-9a-f]+)", answer)
    assert match, f"gpa2hva {guest_address:#x}: {answer}"
    return int(match[1], 16)


def _dont_fork_mappings(pid: int) -> list[tuple[int, int]]:
    """(address, length) of each mapping of the process with MADV_DONTFORK."""
    found, start, end = [], 0, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(text, 16) for text in head.groups())
        elif line.startswith("VmFlags:") and "dc" in line.split():
            found.append((start, end - start))
    return found


def _read_process(pid: int, address: int, length: int) -> bytes:
    """Bytes of another process; ``OSError`` EIO if any of them is not mapped."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        content = bytearray()
        while len(content) < length:
            content += memory.read(length - len(content))
    return bytes(content)
