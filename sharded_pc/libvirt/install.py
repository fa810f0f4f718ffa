"""Where libvirt's hook stands, and how it comes there."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from sharded_pc.errors import HostError
from sharded_pc.libvirt import hook

PLACE = "etc/libvirt/hooks/qemu.d/sharded-pc"
"""libvirt looks into the folder since 6.5; other hooks stay where they are."""


def emulator() -> Path:
    """The one beside this Python, or where a distribution puts it."""
    beside = Path(sys.executable).with_name(Path(hook.EMULATOR).name)
    return beside if beside.exists() else Path(hook.EMULATOR)


def hook_text(emulator: Path) -> str:
    """What stands in the installed file."""
    ours = f"EMULATOR = {json.dumps(str(emulator))}"
    source = Path(hook.__file__).read_text()
    return f"#!{sys.executable} -I\n" + source.replace(f'EMULATOR = "{hook.EMULATOR}"', ours)


def emulator_of(text: str) -> Path | None:
    """The one that an installed hook puts in."""
    found = re.search(r'^EMULATOR = "(.*)"$', text, re.MULTILINE)
    return Path(found[1]) if found else None


def install_hook(emulator: Path, root: Path = Path("/")) -> Path:
    """Writes the hook to its place below `root`, over one that is there; HostError if it cannot."""
    place = root / PLACE
    new = place.with_name(f".{place.name}.new")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(hook_text(emulator))
        new.chmod(0o755)
        os.replace(new, place)  # a migration that begins now finds the old one or the new one
    except OSError as error:
        raise HostError(f"cannot install the hook: {error}; run as root") from error
    return place
