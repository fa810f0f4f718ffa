"""What libvirt's qemu.conf says about the confinement of QEMUs.

Source: the comments in the file itself, which also name the defaults of the version it came with.
"""

from __future__ import annotations

import dataclasses
import pwd
import re
from pathlib import Path

PLACE = "etc/libvirt/qemu.conf"
USERS = ("libvirt-qemu", "qemu")
"""Debian's and Fedora's default, which is compiled in."""
DEVICES = ("null", "full", "zero", "random", "urandom", "ptmx", "kvm")
"""Under /dev, for a version whose qemu.conf does not say."""

_KEY = re.compile(r"^(#?)[ \t]*(\w+)[ \t]*=[ \t]*(\[[^]]*\]|\"[^\"\n]*\"|\d+)", re.MULTILINE)
_ITEM = re.compile(r"\"([^\"\n]*)\"|#[^\n]*")


@dataclasses.dataclass(frozen=True, slots=True)
class QemuConf:
    """Values as libvirt would use them."""

    user: str
    """a name or "+UID" """
    devices: tuple[str, ...]
    """cgroup_device_acl: what is in QEMU's private /dev and allowed by its cgroup"""
    private_dev: bool
    device_cgroup: bool
    labelled: bool
    """a security driver may confine QEMUs"""

    @property
    def of_root(self) -> bool:
        """libvirt leaves root its capabilities, other users none."""
        return self.user in ("root", "+0", "0")

    @classmethod
    def read(cls, root: Path = Path("/")) -> QemuConf:
        """Defaults without a file.  OSError, UnicodeDecodeError if it cannot be read."""
        try:
            text = (root / PLACE).read_text()
        except FileNotFoundError:
            text = ""
        keys = _keys(text)
        acl = keys.get("cgroup_device_acl") or tuple(f"/dev/{each}" for each in DEVICES)
        (user,) = keys.get("user", ()) or (_default_user(),)
        return cls(
            user=user,
            devices=acl,
            private_dev="mount" in keys.get("namespaces", ("mount",)),
            device_cgroup="devices" in keys.get("cgroup_controllers", ("devices",)),
            labelled=keys.get("security_driver", ()) != ("none",),
        )


def _keys(text: str) -> dict[str, tuple[str, ...]]:
    """Every key's strings; those that stand in comments, the defaults, only where no other does."""
    said: dict[str, tuple[str, ...]] = {}
    defaults: dict[str, tuple[str, ...]] = {}
    for mark, key, value in _KEY.findall(text):
        if mark:
            defaults.setdefault(key, tuple(re.findall(r'"([^"\n]*)"', value)))
        else:
            said[key] = tuple(each[1] for each in _ITEM.finditer(value) if each[1] is not None)
    # Examples in comments are not defaults, but for the list of devices.
    return {key: defaults[key] for key in ("cgroup_device_acl",) if key in defaults} | said


def _default_user() -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((each for each in USERS if each in known), "root")
