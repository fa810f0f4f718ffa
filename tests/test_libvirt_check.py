"""`sharded-pc check --libvirt`: described hosts, and a real one that is mended remedy by remedy."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from sharded_pc.host.finding import optional, required
from sharded_pc.libvirt import confined, hook, install
from sharded_pc.libvirt.confined import Answer
from sharded_pc.libvirt.findings import APPARMOR, DEVICE, KEEP, MARK, UDEV, Host, findings
from sharded_pc.libvirt.hook import Rule
from sharded_pc.libvirt.qemu_conf import PLACE, QemuConf
from tests.libvirt import settings
from tests.libvirt.domain import Domain
from tests.libvirt.host import Host as LibvirtHost
from tests.libvirt.host import VirshError
from tests.libvirt.pair import Pair

CONTRIB = Path(__file__).parents[1] / "contrib" / "libvirt"
CONF = QemuConf("libvirt-qemu", ("/dev/null", DEVICE), True, True, True)
ABLE = (
    required("userfaultfd", True, "opened by /dev/userfaultfd", ""),
    optional("kernel-mode faults", True, "served", ""),
)
REFUSED = (ABLE[0], optional("kernel-mode faults", False, "not served", "the ordinary remedy"))
GOOD = Host(
    conf=CONF,
    answer=Answer(ABLE),
    emulator="/usr/bin/ours",
    emulator_there=True,
    device_there=True,
    everybody_may=False,
    apparmor=True,
    apparmor_knows=True,
    selinux=False,
    tmpfiles=True,
    hook="a hook",
    hook_is_ours=True,
    rule=Rule(),
)
DEFAULTS = {"user": settings.USER, "group": settings.USER, "namespaces": ["mount"]}
DEBIAN = """\
# The user for QEMU processes.  Examples:
#       user = "qemu"   # A user named "qemu"
#user = "libvirt-qemu"
# What is in a QEMU's /dev:
#cgroup_device_acl = [
#    "/dev/null", "/dev/full",
#    "/dev/kvm"
#]
#namespaces = [ "mount" ]
#security_driver = "selinux"
"""


class TestQemuConf:
    @pytest.fixture
    def read(self, tmp_path):
        """Of a fake /etc."""

        def read(text: str) -> QemuConf:
            place = tmp_path / PLACE
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
            return QemuConf.read(tmp_path)

        return read

    def test_defaults_stand_in_comments(self, read):
        conf = read(DEBIAN)
        assert conf.devices == ("/dev/null", "/dev/full", "/dev/kvm")
        assert conf.private_dev and conf.device_cgroup and conf.labelled

    def test_no_file(self, tmp_path):
        conf = QemuConf.read(tmp_path)
        assert "/dev/kvm" in conf.devices
        assert conf.private_dev and conf.device_cgroup and conf.labelled

    def test_what_is_said_counts(self, read):
        said = """
            user = "+107"   # not "root"
            namespaces = [ ]
            cgroup_controllers = [ "cpu", "memory" ]
            security_driver = "none"
            cgroup_device_acl = [
                "/dev/null",  # "/dev/no"
                # "/dev/neither",
                "/dev/userfaultfd"
            ]
        """
        conf = read(DEBIAN + said)
        assert conf == QemuConf("+107", ("/dev/null", DEVICE), False, False, False)


def by_name(**changes) -> dict:
    return {each.name: each for each in findings(dataclasses.replace(GOOD, **changes))}


class TestDescribedHosts:
    def test_a_good_one(self):
        assert all(each.ok and each.remedy is None for each in by_name().values())

    @pytest.mark.parametrize(
        ("changes", "name", "remedy"),
        [
            ({"emulator_there": False}, "emulator", "docs/libvirt.md"),
            (
                {"conf": dataclasses.replace(CONF, devices=("/dev/null",))},
                "cgroup_device_acl",
                'cgroup_device_acl = [ "/dev/null", "/dev/userfaultfd" ]',
            ),
            ({"answer": Answer(REFUSED)}, "kernel-mode faults", 'GROUP="kvm"'),
            (
                {"answer": Answer(REFUSED), "device_there": False},
                "kernel-mode faults",
                "vm.unprivileged_userfaultfd=1",
            ),
            (
                {"answer": Answer(REFUSED), "conf": dataclasses.replace(CONF, devices=())},
                "kernel-mode faults",
                "mend cgroup_device_acl first",
            ),
            ({"answer": Answer(error="denied")}, "check as that user", "/opt/sharded-pc"),
            ({"apparmor_knows": False}, "AppArmor", APPARMOR),
        ],
    )
    def test_what_fails_has_its_remedy(self, changes, name, remedy):
        found = by_name(**changes)
        assert not found[name].ok and found[name].required
        assert remedy in found[name].remedy

    @pytest.mark.parametrize(
        ("changes", "name", "said"),
        [
            ({"selinux": True}, "SELinux", "nobody has tried"),
            ({"tmpfiles": False}, "tmpfiles", "sockets in /tmp"),
            ({"hook": None}, "hook", "not installed"),
            ({"hook_is_ours": False}, "hook", "another version"),
            ({"rule": "bad"}, "hook's rule", "bad"),
        ],
    )
    def test_what_can_be_done_without_is_said(self, changes, name, said):
        found = by_name(**changes)[name]
        assert not found.ok and not found.required
        assert said in found.detail and found.remedy

    @pytest.mark.parametrize(
        "changes",
        [
            {"everybody_may": True},
            {"conf": dataclasses.replace(CONF, devices=(), user="root")},
            {"conf": dataclasses.replace(CONF, devices=(), private_dev=False, device_cgroup=False)},
        ],
    )
    def test_not_everybody_needs_the_device(self, changes):
        without = {"conf": dataclasses.replace(CONF, devices=()), **changes}
        found = by_name(**without)
        assert all(each.ok for each in found.values())

    def test_nothing_is_said_of_what_is_not_there(self):
        names = by_name(apparmor=False, tmpfiles=None, hook=None)
        assert not {"AppArmor", "SELinux", "tmpfiles", "hook's rule"} & set(names)


def test_a_fake_etc_is_read(tmp_path):
    """All files at once, below a folder that stands for /; the check itself runs as this user."""
    files = {
        PLACE: f'user = "+{os.getuid()}"\nnamespaces = []\ncgroup_device_acl = ["{DEVICE}"]\n',
        "etc/sharded-pc.toml": 'guests = ["db"]\nleast-memory = "1G"\n',
        "opt/ours": "",
        APPARMOR: "# sharded-pc\n",
        "sys/module/apparmor/parameters/enabled": "Y\n",
        "proc/sys/vm/unprivileged_userfaultfd": "0\n",
        "usr/lib/tmpfiles.d/a.conf": "x /tmp/sharded-pc-*\n",
    }
    for place, text in files.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    (tmp_path / "opt/ours").chmod(0o755)
    install.install_hook(Path("/opt/ours"), tmp_path)
    found = Host.read(tmp_path)
    assert found.emulator == "/opt/ours" and found.emulator_there
    assert found.apparmor and found.apparmor_knows and found.tmpfiles
    assert not found.selinux and not found.device_there and not found.everybody_may
    assert found.rule == Rule(("db",), 1 << 30)
    names = {each.name: each for each in findings(found)}
    assert names["hook"].ok and "guests db" in names["hook's rule"].detail


def test_what_we_ship_is_what_remedies_say(tmp_path):
    shipped = {each.name: each.read_text() for each in CONTRIB.iterdir()}
    assert UDEV in shipped["60-sharded-pc.rules"].splitlines()
    assert KEEP in shipped["tmpfiles.conf"].splitlines()
    assert MARK in shipped["apparmor"] and hook.EMULATOR.startswith("/usr/bin/sharded-pc")
    assert f"{hook.ANNOTATION}: {hook.EMULATOR}\n" in shipped["kubevirt.yaml"]
    (tmp_path / PLACE).parent.mkdir(parents=True)
    (tmp_path / PLACE).write_text(shipped["qemu.conf"])
    assert DEVICE in QemuConf.read(tmp_path).devices


def test_who_there_is_not(tmp_path):
    assert confined.check(dataclasses.replace(CONF, user="nobody-of-that-name")) == Answer(
        error="there is no user 'nobody-of-that-name'"
    )


@pytest.mark.libvirt
@pytest.mark.qemu
@pytest.mark.uffd
@pytest.mark.xdist_group("libvirt")
class TestDebiansDefaults:
    """A host whose QEMUs are libvirt-qemu's, each with a private /dev."""

    def check(self, host: LibvirtHost) -> dict[str, dict]:
        command = f"{sys.executable} -m sharded_pc check --libvirt --json || true"
        answer = json.loads(host.run("sh", "-c", command))
        return {each["name"]: each for each in answer["findings"]}

    def test_each_remedy_mends_and_virsh_agrees(self, hosts: Pair, domain: Domain):
        """Plain QEMU: it can migrate by postcopy here exactly when the check says so."""
        domain.start(hosts.a)
        to = LibvirtHost(hosts.folder / "c", 2, hosts.network, hosts.binary, DEFAULTS)
        with to:
            to.run("chgrp", settings.USER, DEVICE)  # as udev would by the rule, with its group
            to.run("chmod", "660", DEVICE)
            found = self.check(to)
            assert settings.USER in found["QEMU's user"]["detail"]
            assert not found["cgroup_device_acl"]["ok"]
            assert "cgroup_device_acl" in found["kernel-mode faults"]["remedy"]
            with pytest.raises(VirshError, match="Postcopy is not supported"):
                domain.migrate(hosts.a, to, "--postcopy")

            line = found["cgroup_device_acl"]["remedy"].partition(" in /")[0]
            with (to.folder / "etc/libvirt/qemu.conf").open("a") as conf:
                conf.write(line + "\n")
            to.restart_daemon()
            to.run("chmod", "600", DEVICE)
            found = self.check(to)
            assert found["cgroup_device_acl"]["ok"]
            assert "udev" in found["kernel-mode faults"]["remedy"]

            to.run("chmod", "660", DEVICE)
            found = self.check(to)
            assert found["kernel-mode faults"]["ok"] and found["userfaultfd"]["ok"]
            domain.migrate(hosts.a, to, "--postcopy", "--postcopy-after-precopy")
            domain.wait_passes(to)
