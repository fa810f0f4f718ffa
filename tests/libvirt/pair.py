"""Two hosts on one network, and whether this machine can have them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sharded_pc.testing.certificates import Authority
from tests.libvirt.domain import MEMORY_MIB
from tests.libvirt.host import Host
from tests.libvirt.network import Network
from tests.qemu import backports
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import write_image

PROGRAMS = ("libvirtd", "virsh", "nsenter", "unshare", "ip", "ps")


def lacking() -> str | None:
    """Why there can be none here, with the remedy; None if there can."""
    if os.geteuid() != 0:
        return "two libvirtd need root, for their namespaces"
    if missing := [each for each in PROGRAMS if not shutil.which(each)]:
        return f"no {', '.join(missing)}: tools/install-system-packages --tests"
    if backports.newer_qemu() is None:
        return "needs QEMU >= 10: python -m tests.qemu.backports fetch"
    return None


@dataclass(frozen=True)
class Pair:
    """Migrations go from ``a`` to ``b``; ``image`` is the guest's disk, ``folder`` everybody's."""

    a: Host
    b: Host
    image: Path
    folder: Path
    network: Network
    """for further hosts"""
    binary: QemuBinary


def _certificates(folder: Path) -> Path:
    """Of both hosts; for any user to read, as QEMU is not always root's."""
    authority = Authority(folder)
    for what in ("server", "client"):
        authority.issue(folder, what)
    for each in folder.iterdir():
        each.chmod(0o644)
    return folder


@contextlib.contextmanager
def pair() -> Iterator[Pair]:
    """Both, running; nothing is left of them. ``lacking`` is to be asked before."""
    binary = backports.newer_qemu()
    assert binary is not None
    with contextlib.ExitStack() as stack:
        # pytest's own folders have long names, and sockets stand in these
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="libvirt-")))
        folder.chmod(0o755)  # QEMU's user may be another
        image = write_image(folder / "guest.img", MEMORY_MIB)
        image.chmod(0o666)
        qemu = {"migrate_tls_x509_cert_dir": str(_certificates(folder / "tls"))}
        network = stack.enter_context(Network())
        a = stack.enter_context(Host(folder / "a", 0, network, binary, qemu))
        b = stack.enter_context(Host(folder / "b", 1, network, binary, qemu))
        yield Pair(a, b, image, folder, network, binary)
