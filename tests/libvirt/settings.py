"""What a host has in ``/etc`` of its own: libvirtd.conf, qemu.conf, the user of Debian's QEMUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Value = str | int | list[str]

LOG = "/var/log/libvirt/libvirtd.log"
DAEMON: dict[str, Value] = {
    "auth_unix_ro": "none",
    "auth_unix_rw": "none",
    "unix_sock_group": "root",  # the default, "libvirt", is made by a package that is not needed
    # the first gives every line of QMP
    "log_filters": "1:qemu.qemu_monitor 1:qemu.qemu_migration 1:qemu.qemu_process 3:*",
    "log_outputs": f"1:file:{LOG}",
}
QEMU: dict[str, Value] = {
    "security_driver": "none",
    "user": "root",
    "group": "root",
    "remember_owner": 0,
    "dynamic_ownership": 0,
    "namespaces": [],
    "cgroup_controllers": [],
    "stdio_handler": "file",  # no virtlogd
}
USER = "libvirt-qemu"
"""libvirtd ends without it, wanted or not.  A package that brings services as well makes it."""
UID = 64055
USERS = {
    "passwd": f"{USER}:x:{UID}:{UID}::/var/lib/libvirt:/usr/sbin/nologin",
    "group": f"{USER}:x:{UID}:",
}


def write(etc: Path, uuid: str, qemu: Mapping[str, Value]) -> None:
    """Fills ``etc``; ``uuid`` is the host's, which libvirt tells hosts apart by."""
    for name, line in USERS.items():
        lines = (Path("/etc") / name).read_text().splitlines()
        others = [each for each in lines if not each.startswith(f"{USER}:")]
        (etc / name).write_text("\n".join([*others, line, ""]))
    folder = etc / "libvirt"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "libvirtd.conf").write_text(_lines({"host_uuid": uuid, **DAEMON}))
    (folder / "qemu.conf").write_text(_lines({**QEMU, **qemu}))


def _lines(settings: Mapping[str, Value]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in settings.items())


def _value(value: Value) -> str:
    if isinstance(value, list):
        return f"[ {', '.join(map(_value, value))} ]"
    return str(value) if isinstance(value, int) else f'"{value}"'
