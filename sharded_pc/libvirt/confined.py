"""`sharded-pc check` as libvirt's QEMUs are: as their user, in the /dev that they see.

libvirt gives each QEMU a /dev of its own with the devices of cgroup_device_acl, as they are in the
host's as to owner, mode and ACL, and with the host's /dev/shm (libvirt's
src/qemu/qemu_namespace.c).  Programs of util-linux do the same here, in a namespace that ends with
the check.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import subprocess
import sys
import tempfile

from sharded_pc.host import Finding
from sharded_pc.libvirt.qemu_conf import QemuConf

TIMEOUT_S = 60
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FOLDERS = ("shm", "pts", "mqueue", "hugepages")
"""Mounts below /dev that libvirt keeps."""
SCRIPT = """
set -e
new=$1; shift
mount -t tmpfs -o mode=755 tmpfs "$new"
while [ "$1" != -- ]; do
    there=$new/${1#/dev/}
    if [ -d "$1" ]; then mkdir -p "$there"; mount --rbind "$1" "$there"
    elif [ -e "$1" ]; then mkdir -p "${there%/*}"; : > "$there"; mount --bind "$1" "$there"
    fi
    shift
done
shift
mount --move "$new" /dev
cd /
exec "$@"
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the check said; `error` if it did not run."""

    findings: tuple[Finding, ...] = ()
    error: str = ""


def check(conf: QemuConf) -> Answer:
    """Never raises: what fails is the answer.  Needs root, as libvirtd does."""
    try:
        user = _entry(conf.user)
    except (KeyError, ValueError):
        return Answer(error=f"there is no user {conf.user!r}")
    if os.geteuid() != 0:
        return Answer(error="only root can become that user")
    try:
        return _run(conf, user)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(error=str(error))


def _run(conf: QemuConf, user: pwd.struct_passwd) -> Answer:
    ours = [sys.executable, "-I", "-m", "sharded_pc", "check", "--json"]
    become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}"]
    command = [*become, "--init-groups", "--inh-caps=-all", "--", *ours]
    with tempfile.TemporaryDirectory(prefix="sharded-pc-dev-") as new:
        if conf.private_dev:
            seen = [*conf.devices, *(f"/dev/{each}" for each in FOLDERS)]
            apart = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", SCRIPT]
            command = [*apart, "sh", new, *seen, "--", *command]
        environment = {"PATH": PATH, "LC_ALL": "C", "HOME": user.pw_dir}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment
        )
    return _parse(done)


def _parse(done: subprocess.CompletedProcess[str]) -> Answer:
    try:
        found = json.loads(done.stdout)["findings"]
        return Answer(tuple(Finding(**each) for each in found))
    except (ValueError, LookupError, TypeError):
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        return Answer(error=f"{sys.executable} ended with {done.returncode}: {said[0]}")


def _entry(user: str) -> pwd.struct_passwd:
    """libvirt takes "+N" for the number N, and a number that is no name as well."""
    if user.startswith("+"):
        return pwd.getpwuid(int(user[1:]))
    try:
        return pwd.getpwnam(user)
    except KeyError:
        return pwd.getpwuid(int(user))
