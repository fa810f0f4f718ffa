"""Which QEMU binaries there are to test with, and how to get a newer one beside the installed.

The distribution's is found on PATH. A newer one lives in a cache folder,
``$SHARDED_PC_QEMU_CACHE`` or ``~/.cache/sharded_pc/qemu``, one sub-folder per version, each with
the packages unpacked under it. ``python -m tests.qemu.backports ensure``, which ``make test``
runs, fills it from the backports suite of the Debian mirror that this machine's apt is configured
for, unless there is a newer QEMU already; ``fetch`` does so in any case, ``list`` shows what would
be used. Nothing is installed: packages are only unpacked into the cache.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROGRAM = "qemu-system-x86_64"
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
APT_ETC = Path("/etc/apt")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TRIPLET = "x86_64-linux-gnu"
TIMEOUT_S = 300
NEWER = (10,)
"""From this version on a source under TCG loses no dirty page of a guest that writes (facts of the
project): what tests mean by a newer QEMU."""

_Entry = tuple[str, list[str], Path | None]  # URI, suites, keyring


class FetchError(Exception):
    """A newer QEMU could not be had; the text says why and what was tried."""


@dataclass(frozen=True)
class QemuBinary:
    """A QEMU to run: ``[path, *args]`` with ``environment`` added to ours."""

    path: Path
    version: tuple[int, int, int]
    args: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """The version, fit for a pytest id: ``qemu-7.2.22``."""
        return "qemu-" + ".".join(map(str, self.version))

    def command(self) -> list[str]:
        return [str(self.path), *self.args]

    def full_environment(self) -> dict[str, str]:
        return {**os.environ, **dict(self.environment)}


# --- finding ---


def cache_folder() -> Path:
    """The folder of unpacked QEMUs; it need not exist."""
    default = Path.home() / ".cache" / "sharded_pc" / "qemu"
    return Path(os.environ.get("SHARDED_PC_QEMU_CACHE") or default)


@cache
def distribution_qemu() -> QemuBinary | None:
    """The QEMU on PATH, or None."""
    path = shutil.which(PROGRAM)
    return _probe(Path(path)) if path else None


@cache
def cached_qemus() -> tuple[QemuBinary, ...]:
    """Every QEMU in the cache folder that starts, oldest first."""
    roots = [root for root in cache_folder().glob("*") if not root.name.startswith(".")]
    found = [binary for root in roots if (binary := unpacked_qemu(root))]
    return tuple(sorted(found, key=lambda binary: binary.version))


def available_qemus() -> tuple[QemuBinary, ...]:
    """The distribution's QEMU, then the cached ones. May be empty."""
    distribution = distribution_qemu()
    return (*([distribution] if distribution else []), *cached_qemus())


def newest_qemu() -> QemuBinary | None:
    """The available QEMU with the highest version, or None."""
    return max(available_qemus(), key=lambda binary: binary.version, default=None)


def newer_qemu() -> QemuBinary | None:
    """The newest QEMU if it is ``NEWER``, or None."""
    newest = newest_qemu()
    return newest if newest and newest.version >= NEWER else None


def unpacked_qemu(root: Path) -> QemuBinary | None:
    """The QEMU whose packages were unpacked under ``root``, or None if it does not start."""
    path, libraries = root / "usr/bin" / PROGRAM, root / "usr/lib" / TRIPLET
    if not path.is_file():
        return None
    share = root / "usr/share"
    firmware = ("-L", str(share / "qemu"), "-L", str(share / "seabios"))
    # without the first, the modules of the installed QEMU are tried and complained about
    environment = {"QEMU_MODULE_DIR": str(libraries / "qemu"), **_library_path(root)}
    return _probe(path, firmware, tuple(environment.items()))


def _library_path(root: Path) -> dict[str, str]:
    """What makes the loader find libraries unpacked under ``root``, if there are any."""
    folders = [root / "usr/lib" / TRIPLET, root / "lib" / TRIPLET]
    used = [str(folder) for folder in folders if any(folder.glob("*.so*"))]
    return {"LD_LIBRARY_PATH": ":".join(used)} if used else {}


def _probe(
    path: Path, args: tuple[str, ...] = (), environment: tuple[tuple[str, str], ...] = ()
) -> QemuBinary | None:
    """The binary with its version, or None if ``--version`` does not work."""
    command, env = [str(path), "--version"], {**os.environ, **dict(environment)}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", done.stdout)
    if done.returncode or not match:
        return None
    major, minor, micro = map(int, match.groups())
    return QemuBinary(path, (major, minor, micro), args, environment)


# --- fetching ---


def fetch(target: Path | None = None) -> QemuBinary:
    """Downloads the backports' QEMU into ``target`` (default: the cache folder).

    The folder of a version appears there by one rename, after the binary in it has run.
    Raises ``FetchError``; then nothing is left behind.
    """
    target = target or cache_folder()
    mirror = configured_mirror()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target) as work:
        root = Path(work) / "root"
        for package in _download(mirror, Path(work)):
            _run(["dpkg", "-x", str(package), str(root)])
        return _publish(root, target)


def configured_mirror() -> tuple[str, str, str]:
    """(apt options in brackets or "", URI, codename) of the Debian mirror apt uses here."""
    if platform.machine() != "x86_64":
        raise FetchError(f"only for x86_64, this is {platform.machine()}")
    codename = _codename()
    for uri, suites, keyring in [*_deb822_entries(), *_one_line_entries()]:
        if codename in suites:
            signed_by = keyring or (KEYRING if KEYRING.exists() else None)
            return (f"[signed-by={signed_by}]" if signed_by else "", uri, codename)
    raise FetchError(f"no source for {codename!r} is configured under {APT_ETC}")


def missing_libraries(binary: Path, root: Path) -> list[str]:
    """The sonames that the loader finds for ``binary`` neither in the system nor in ``root``."""
    env = {**os.environ, **_library_path(root)}
    listing = subprocess.run(["ldd", str(binary)], env=env, capture_output=True, text=True)
    return re.findall(r"^\s*(\S+) => not found", listing.stdout, re.MULTILINE)


def _codename() -> str:
    release = Path("/etc/os-release")
    text = release.read_text() if release.exists() else ""
    match = re.search(r"^VERSION_CODENAME=(\w+)", text, re.MULTILINE)
    if not match or not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise FetchError("this is not a Debian with apt-get and dpkg")
    return match[1]


def _deb822_entries() -> Iterator[_Entry]:
    """The stanzas with the component main."""
    for file in sorted((APT_ETC / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", file.read_text()):
            fields = dict(re.findall(r"^([\w-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
            if "main" in fields.get("Components", "").split() and fields.get("URIs"):
                uri, suites = fields["URIs"].split()[0], fields.get("Suites", "").split()
                yield uri, suites, _existing(fields.get("Signed-By", ""))


def _one_line_entries() -> Iterator[_Entry]:
    """The lines with the component main, in files of the one-line style."""
    for file in [APT_ETC / "sources.list", *sorted((APT_ETC / "sources.list.d").glob("*.list"))]:
        text = file.read_text() if file.exists() else ""
        for options, uri, suite, components in re.findall(
            r"^deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)\s+(.*)$", text, re.MULTILINE
        ):
            keyring = re.search(r"signed-by=(\S+)", options)
            if "main" in components.split():
                yield uri, [suite], _existing(keyring[1] if keyring else "")


def _existing(keyring: str) -> Path | None:
    return Path(keyring) if keyring.startswith("/") and Path(keyring).exists() else None


def _download(mirror: tuple[str, str, str], work: Path) -> list[Path]:
    """The .deb files of PACKAGES and of every package they need that is not installed here."""
    options, uri, codename = mirror
    suite = f"{codename}-backports"
    sources = work / "sources.list"
    sources.write_text("".join(f"deb {options} {uri} {name} main\n" for name in (codename, suite)))
    apt = ["apt-get", *_private_apt_options(work, sources)]
    _run([*apt, "update"])
    _run([*apt, "install", "--yes", "--download-only", "--reinstall", "--no-install-recommends",
          f"--target-release={suite}", *PACKAGES])  # fmt: skip
    return sorted((work / "cache" / "archives").glob("*.deb"))


def _private_apt_options(work: Path, sources: Path) -> list[str]:
    """Makes apt read our list and write below ``work``; it sees the installed packages, no more."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        "Dir::Log": work,
        "Debug::NoLocking": "true",
        "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any",  # else "update" succeeds with all downloads failed
        "Acquire::Retries": "3",
        "Acquire::http::Timeout": "10",  # a host without a network finds out soon
        "Acquire::https::Timeout": "10",
    }
    return [arg for key, value in settings.items() for arg in ("-o", f"{key}={value}")]


def _publish(root: Path, target: Path) -> QemuBinary:
    """Moves ``root`` to its place in ``target`` once the binary in it runs."""
    unpacked = unpacked_qemu(root)
    if unpacked is None:
        binary = root / "usr/bin" / PROGRAM
        missing = missing_libraries(binary, root) if binary.exists() else [str(binary)]
        raise FetchError(f"the unpacked QEMU does not run; missing: {', '.join(missing)}")
    place = target / str(unpacked)
    if place.exists():
        shutil.rmtree(place)
    root.rename(place)
    published = unpacked_qemu(place)
    assert published is not None, "the same files ran a moment ago"
    return published


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise FetchError(f"{' '.join(command)} failed:\n{said}")


def ensure() -> None:
    """Fetches unless there is one, and says so; nothing where there is nothing to do.

    That there can be none here is no error: tests that need one skip with their reason.
    """
    if cached_qemus() or newer_qemu():  # a cached one is the newest that the backports had
        return
    print("fetching a newer QEMU from the backports", file=sys.stderr, flush=True)
    try:
        print(f"fetched {fetch()}", file=sys.stderr)
    except (FetchError, OSError) as error:
        lines = str(error).splitlines()
        why = next((line for line in lines if line.startswith("E: ")), lines[-1])
        print(f"no newer QEMU, tests that need one are skipped: {why}", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """``ensure``, ``fetch`` or ``list``; returns the exit code."""
    if arguments == ["ensure"]:
        ensure()
        return 0
    if arguments not in (["fetch"], ["list"]):
        print("usage: python -m tests.qemu.backports {ensure,fetch,list}", file=sys.stderr)
        return 2
    try:
        binaries = [fetch()] if arguments == ["fetch"] else available_qemus()
    except (FetchError, OSError) as error:
        print(f"cannot fetch a newer QEMU: {error}", file=sys.stderr)
        return 1
    for binary in binaries:
        print(f"{binary}\t{' '.join(binary.command())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
