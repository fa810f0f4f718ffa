"""Records a postcopy migration, for `sharded-pc bench replay`.

    python -m benchmarks.record FILE [--memory 1024] [--qemu BINARY]

Run it from a checkout (it uses the QEMUs and the fixtures of tests/).  A real QEMU under TCG, whose
guest has not run yet, gets its memory filled: pages of noise, and one page in ten of zeros, in
stretches.  It migrates by postcopy at once, so that all pages come after the switch, into
`sharded-pc receive --record FILE`.  FILE.json says what stands in FILE where, and how a QEMU is
started that can take it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sharded_pc.bench import recording
from sharded_pc.bench.product import Product
from sharded_pc.bench.recording import Qemu, Recording
from sharded_pc.errors import ShardedPcError
from tests.qemu import backports, memory
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import MIB, PAGE_SIZE, guest_args
from tests.qemu.vm import QemuVm

ZERO_RUN, DATA_RUN = 16, 144
"""Pages, on average: one in ten is zero."""
PRECOPY_RATE = MIB
"""Bytes a second until the switch, which is asked for at once."""


def zero_runs(pages: int, seed: int) -> Iterator[tuple[int, int]]:
    """(first page, pages) of the stretches that are to be zeros."""
    chance = random.Random(seed)
    at = chance.randrange(2 * DATA_RUN)
    while at < pages:
        run = min(chance.randrange(1, 2 * ZERO_RUN), pages - at)
        yield at, run
        at += run + chance.randrange(1, 2 * DATA_RUN)


def fill(block: memory.BlockMemory, seed: int = 1) -> None:
    """Writes into a stopped QEMU's RAM, from 1 MiB on; what is below the BIOS may have used."""
    chance = random.Random(seed)
    with Path(f"/proc/{block.pid}/mem").open("r+b", buffering=0) as file:
        for offset in range(MIB, block.length, MIB):
            _write(file, block.host_address + offset, chance.randbytes(MIB))
        for first, count in zero_runs((block.length - MIB) // PAGE_SIZE, seed):
            _write(file, block.host_address + MIB + first * PAGE_SIZE, bytes(count * PAGE_SIZE))


def _write(file, address: int, content: bytes) -> None:
    file.seek(address)
    while content:
        content = content[file.write(content) :]


def _migrate(source: QemuVm, uri: str) -> None:
    source.set_capabilities(postcopy_ram=True)
    source.set_parameters(max_bandwidth=PRECOPY_RATE, max_postcopy_bandwidth=0)
    source.migrate(uri)
    source.start_postcopy()
    source.wait_migration("completed")


def _destination(binary: QemuBinary, memory_mib: int) -> Qemu:
    command = [*binary.command(), *guest_args("pc", memory_mib), "-serial", "null"]
    version = ".".join(map(str, binary.version))
    return Qemu(tuple(command), dict(binary.environment), version)


def record(file: Path, memory_mib: int, binary: QemuBinary | None = None) -> Recording:
    """Makes FILE and FILE.json; VmError, ShardedPcError."""
    with tempfile.TemporaryDirectory(prefix="record-") as place:
        folder = Path(place)
        source = QemuVm(folder, "src", binary=binary, memory_mib=memory_mib, extra=["-S"])
        receiver = Product(
            folder, f"record-{os.getpid()}", f"unix:{folder / 'mig'}", "--record", str(file)
        )
        with source, receiver:
            fill(memory.blocks(source)["pc.ram"])
            _migrate(source, receiver.uri)
            ending = receiver.finish()
        if ending.exit_code:
            raise ShardedPcError(f"the receiver failed: {ending.stderr}")
    recording.sidecar(file).unlink(missing_ok=True)
    found = recording.read(file)
    recording.write_sidecar(found, _destination(source.binary, memory_mib))
    return recording.read(file)


def _binary(name: str | None) -> QemuBinary | None:
    """By its path, or as `python -m tests.qemu.backports list` calls it; None: the installed."""
    if name is None:
        return None
    for known in backports.available_qemus():
        if name in (str(known), str(known.path)):
            return known
    found = backports._probe(Path(name))
    if found is None:
        sys.exit(f"{name} does not answer to --version as a QEMU does")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="default 1024")
    parser.add_argument("--qemu", metavar="BINARY", help="default: the installed one")
    args = parser.parse_args()
    found = record(args.file.absolute(), args.memory, _binary(args.qemu))
    assert found.qemu is not None
    print(
        f"{args.file}: {found.size} bytes, QEMU {found.qemu.version}, {found.machine}, "
        f"{found.normal} pages with data, {found.zero} zero; set-up ends at {found.setup_end}, "
        f"the switch is at {found.package_at}"
    )


if __name__ == "__main__":
    main()
