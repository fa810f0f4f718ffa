"""A Linux guest that writes: Debian's kernel, and one process (linux_guest.c) in its initramfs.

The kernel's package is fetched by apt from this machine's mirror into the cache of the tests' QEMUs
and only unpacked.  The guest boots once; its state in a file is where each source then begins.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.qemu.backports import QemuBinary, cache_folder
from tests.qemu.vm import QemuVm

PACKAGE = "linux-image-amd64"
HEAD = "console=ttyS0 quiet loglevel=0 mitigations=off panic=-1 rdinit=/init"
BOOT_SECONDS = 300


def kernel() -> Path:
    """Debian's, out of its package; FileNotFoundError or CalledProcessError without apt."""
    folder = cache_folder().parent / "kernel"
    found = sorted(folder.glob("vmlinuz-*"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as at:
            _fetch(Path(at))
            for each in Path(at).glob("boot/vmlinuz-*"):
                shutil.move(each, folder)
        found = sorted(folder.glob("vmlinuz-*"))
    return found[-1]


def _fetch(folder: Path) -> None:
    """The package that PACKAGE depends on, whose name has the version."""
    told = _run("apt-cache", "depends", PACKAGE, folder=folder)
    name = re.search(r"Depends: (linux-image-\S+)", told)
    assert name, f"{PACKAGE} depends on no kernel:\n{told}"
    _run("apt-get", "download", name[1], folder=folder)
    (package,) = folder.glob("*.deb")
    _run("dpkg-deb", "-x", package.name, ".", folder=folder)


def _run(*words: str, folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, check=True, text=True, stdout=subprocess.PIPE)
    return done.stdout


def initramfs(folder: Path, size_mib: int) -> Path:
    """An archive with the program as /init, and the console it prints on."""
    program, archive = folder / "init", folder / "initramfs"
    source = Path(__file__).with_suffix(".c")
    command = ["cc", "-O1", "-static", f"-DSIZE_MIB={size_mib}", "-o", program, source]
    subprocess.run(command, check=True)
    entries = [
        _entry("dev", 0o40755),
        _entry("dev/console", 0o20600, device=(5, 1)),
        _entry("init", 0o100755, program.read_bytes()),
        _entry("TRAILER!!!", 0),
    ]
    archive.write_bytes(b"".join(entries))
    return archive


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """Of a cpio archive in the kernel's format (Documentation/driver-api/early-userspace/
    buffer-format.rst)."""
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def arguments(folder: Path, size_mib: int) -> list[str]:
    """Of QEMU, at source and destination alike."""
    initrd = initramfs(folder, size_mib)
    return ["-kernel", str(kernel()), "-initrd", str(initrd), "-append", HEAD]


def boot(folder: Path, binary: QemuBinary, memory_mib: int, extra: list[str], machine: str) -> Path:
    """The state of the guest once it has filled its memory, in a file."""
    state = folder / f"{binary}-{machine}.state"
    options = {"binary": binary, "memory_mib": memory_mib, "extra": extra, "machine": machine}
    with QemuVm(folder, "boot", **options) as guest:
        guest.wait_serial("filled", BOOT_SECONDS)
        guest.qmp("stop")
        guest.set_parameters(max_bandwidth=0)
        guest.migrate(f"exec:cat > {state}")
        guest.wait_migration("completed", timeout=BOOT_SECONDS)
    return state


def passes(serial: str) -> list[tuple[int, float]]:
    """(number, milliseconds) of each whole pass that the guest has told."""
    found = re.findall(r"^pass (\d+) ([\d.]+)\r?$", serial, re.MULTILINE)
    return [(int(number), float(took)) for number, took in found]
