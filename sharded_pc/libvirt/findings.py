"""What a host of libvirt lacks to have domains received in shards: a finding for each need.

`Host` reads, the judges are pure, so that any host can be described to them.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from sharded_pc.host import Finding
from sharded_pc.host.finding import fact, optional, required
from sharded_pc.libvirt import confined, hook, install
from sharded_pc.libvirt.confined import Answer
from sharded_pc.libvirt.hook import Rule
from sharded_pc.libvirt.qemu_conf import PLACE, QemuConf

DEVICE = "/dev/userfaultfd"
RESTART = "systemctl restart libvirtd (or virtqemud)"
RULE = "etc/udev/rules.d/60-sharded-pc.rules"
UDEV = 'KERNEL=="userfaultfd", SUBSYSTEM=="misc", GROUP="kvm", MODE="0660"'
APPARMOR = "etc/apparmor.d/local/abstractions/libvirt-qemu"
TMPFILES = ("etc/tmpfiles.d", "usr/lib/tmpfiles.d")
KEEP = "x /tmp/sharded-pc-*"
MARK = "sharded-pc"
"""Stands in our addition to AppArmor's file."""
OF_THE_DEVICE = ("userfaultfd", "kernel-mode faults")
"""Findings of the ordinary check that libvirt's confinement decides."""


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """Everything at one moment."""

    conf: QemuConf
    answer: Answer
    emulator: str
    emulator_there: bool
    device_there: bool
    everybody_may: bool
    """vm.unprivileged_userfaultfd is 1"""
    apparmor: bool
    apparmor_knows: bool
    selinux: bool
    tmpfiles: bool | None
    """they leave our folders in /tmp alone; None: no systemd-tmpfiles here"""
    hook: str | None
    """the installed one"""
    hook_is_ours: bool
    """this version's"""
    rule: Rule | str
    """the hook's, or what is wrong with it"""

    @classmethod
    def read(cls, root: Path = Path("/")) -> Host:
        """Of this machine, with the files below `root`."""
        conf = QemuConf.read(root)
        try:
            rule: Rule | str = hook.read_rule(str(root / hook.SETTINGS.lstrip("/")))
        except hook.Unusable as error:
            rule = str(error)
        installed = _said(root, install.PLACE)
        emulator = install.emulator_of(installed or "") or install.emulator()
        cleaned = [root / each for each in TMPFILES if (root / each).is_dir()]
        return cls(
            conf=conf,
            answer=confined.check(conf),
            emulator=str(emulator),
            emulator_there=os.access(root / str(emulator).lstrip("/"), os.X_OK),
            device_there=(root / DEVICE.lstrip("/")).exists(),
            everybody_may=_said(root, "proc/sys/vm/unprivileged_userfaultfd") == "1",
            apparmor=_said(root, "sys/module/apparmor/parameters/enabled") == "Y",
            apparmor_knows=MARK in (_said(root, APPARMOR) or ""),
            selinux=_said(root, "sys/fs/selinux/enforce") == "1",
            tmpfiles=any(MARK in each.read_text() for folder in cleaned for each in
                         folder.glob("*.conf")) if cleaned else None,
            hook=installed,
            hook_is_ours=installed == install.hook_text(emulator).strip(),
            rule=rule,
        )  # fmt: skip


def findings(host: Host | None = None) -> list[Finding]:
    """Everything that `sharded-pc check --libvirt` shows."""
    host = host or Host.read()
    return [*(found for judge in JUDGES if (found := judge(host))), *_as_that_user(host)]


def _said(root: Path, place: str) -> str | None:
    try:
        return (root / place).read_text().strip()
    except OSError:
        return None


# --- judges ---


def user(host: Host) -> Finding:
    where = "with a private /dev" if host.conf.private_dev else "with the host's /dev"
    return fact("QEMU's user", f"{host.conf.user}, {where} ({PLACE})")


def emulator(host: Host) -> Finding:
    detail = host.emulator if host.emulator_there else f"no {host.emulator}"
    remedy = "install sharded_pc where libvirt finds it, see docs/libvirt.md"
    return required("emulator", host.emulator_there, detail, remedy)


def device_acl(host: Host) -> Finding | None:
    """Without the device in it QEMU, plain QEMU too, is not given one that KVM can fault on."""
    if not (host.conf.private_dev or host.conf.device_cgroup):
        return None
    listed = DEVICE in host.conf.devices
    detail = f"{DEVICE} is {'' if listed else 'not '}in it"
    if not listed and host.conf.of_root:
        detail += ", root needs none"
    ok = listed or host.everybody_may or host.conf.of_root
    return required("cgroup_device_acl", ok, detail, _acl_remedy(host))


def _acl_remedy(host: Host) -> str:
    devices = ", ".join(f'"{each}"' for each in (*host.conf.devices, DEVICE))
    line = f"cgroup_device_acl = [ {devices} ] in /{PLACE}, then {RESTART}"
    return f"{line}; or sysctl vm.unprivileged_userfaultfd=1"


def apparmor(host: Host) -> Finding | None:
    if not (host.apparmor and host.conf.labelled):
        return None
    remedy = f"cat contrib/libvirt/apparmor >> /{APPARMOR}; domains that start from then on have it"
    detail = "our addition is there" if host.apparmor_knows else "QEMUs may not start a receiver"
    return required("AppArmor", host.apparmor_knows, detail, remedy)


def selinux(host: Host) -> Finding | None:
    if not (host.selinux and host.conf.labelled):
        return None
    remedy = "semanage permissive -a svirt_t, and tell us what was logged"
    return optional(
        "SELinux", False, "enforcing; nobody has tried a receiver under svirt_t", remedy
    )


def tmpfiles(host: Host) -> Finding | None:
    """A guest that is paused in postcopy for days still needs its sockets."""
    if host.tmpfiles is None:
        return None
    detail = "leave our sockets alone" if host.tmpfiles else "take sockets in /tmp that are old"
    remedy = f"echo '{KEEP}' > /etc/tmpfiles.d/sharded-pc.conf"
    return optional("tmpfiles", host.tmpfiles, detail, remedy)


def hook_installed(host: Host) -> Finding:
    """A domain may have the emulator without it."""
    if host.hook is None:
        detail = "not installed: only domains whose XML names the emulator get it"
    else:
        detail = "installed" if host.hook_is_ours else "another version's is installed"
    ok = host.hook is not None and host.hook_is_ours
    return optional("hook", ok, detail, "sharded-pc libvirt install-hook")


def hook_rule(host: Host) -> Finding | None:
    if host.hook is None:
        return None
    if isinstance(host.rule, str):
        return optional("hook's rule", False, host.rule, f"mend {hook.SETTINGS}")
    least, guests = host.rule.least_memory, ", ".join(host.rule.guests) or "none"
    return fact("hook's rule", f"guests {guests}, with at least {least} bytes of memory")


JUDGES = (
    user, emulator, device_acl, apparmor, selinux, tmpfiles, hook_installed, hook_rule
)  # fmt: skip


def _as_that_user(host: Host) -> list[Finding]:
    """The ordinary check's answers; all that a guest under KVM needs is required."""
    if host.answer.error:
        remedy = (
            f"as root, with sharded_pc where {host.conf.user} may read it, e.g. python3 -m venv"
            " /opt/sharded-pc"
        )
        return [required("check as that user", False, host.answer.error, remedy)]
    return [_adapted(host, each) for each in host.answer.findings]


def _adapted(host: Host, found: Finding) -> Finding:
    if found.name not in OF_THE_DEVICE:
        return found
    needed = dataclasses.replace(found, required=True)
    return needed if found.ok else dataclasses.replace(needed, remedy=_device_remedy(host))


def _device_remedy(host: Host) -> str:
    if not host.device_there:
        return "sysctl vm.unprivileged_userfaultfd=1, or boot Linux 6.1 or newer"
    if host.conf.private_dev and DEVICE not in host.conf.devices:
        return "mend cgroup_device_acl first"
    return (
        f"echo '{UDEV}' > /{RULE}; udevadm control --reload; udevadm trigger {DEVICE}"
        " (QEMU's user must be in that group); or sysctl vm.unprivileged_userfaultfd=1"
    )
