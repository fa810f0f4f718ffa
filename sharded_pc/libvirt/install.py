"""Where libvirt's hook stands, and how it comes there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sharded_pc.errors import HostError
from sharded_pc.libvirt import hook

PLACE = "etc/libvirt/hooks/qemu.d/sharded-pc"
"""libvirt looks into the folder since 6.5; other hooks stay where they are."""


def install_hook(root: Path = Path("/")) -> Path:
    """Copies the hook to its place below `root`, over one that is there; HostError if it cannot."""
    place = root / PLACE
    new = place.with_name(f".{place.name}.new")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(f"#!{sys.executable} -I\n{Path(hook.__file__).read_text()}")
        new.chmod(0o755)
        os.replace(new, place)  # a migration that begins now finds the old one or the new one
    except OSError as error:
        raise HostError(f"cannot install the hook: {error}; run as root") from error
    return place
