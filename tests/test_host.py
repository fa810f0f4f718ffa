"""What this host can do: real answers of this one, and hosts described by their limits."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_pc import host
from sharded_pc.cli import check
from sharded_pc.errors import ExitCode, HostError
from sharded_pc.host import Finding, Limits, Probe
from sharded_pc.host.limits import Cgroup, Shm, cgroups
from sharded_pc.native.uffd import FEATURES, How, Info

MIB, GIB = 1 << 20, 1 << 30
NOBODY = 65534

IOCTLS = 0b11100
ABLE = Probe(Info(How.DEVICE, sum(FEATURES.values()), 0x1FF, 0, 0), IOCTLS)
USER_ONLY = Probe(
    Info(How.USER_ONLY, sum(FEATURES.values()), 0x1FF, errno.EACCES, errno.EPERM), IOCTLS
)
ROOMY = Limits(
    kernel="6.1.0-9-amd64",
    page_bytes=4096,
    unprivileged_uffd=0,
    shm=Shm("tmpfs", writable=True, size=8 * GIB, free=6 * GIB),
    mem_available=12 * GIB,
    cgroup=None,
    address_space=None,
    file_size=None,
    max_map_count=65530,
    shmem_huge="never",
    huge_pages=0,
    cpus=4,
)

# Runs as Python in a child: `check --json`, its output and exit code.
CHECK = """
import argparse, sys
from sharded_pc.cli.check import Check
import sharded_pc.host
parser = argparse.ArgumentParser()
Check().add_arguments(parser)
{before}
sys.exit(Check().run(parser.parse_args(["--json"])))
"""


def described(probe: Probe = ABLE, **changes) -> dict[str, Finding]:
    """Findings of a roomy host with these changes, by name."""
    limits = dataclasses.replace(ROOMY, **changes)
    return {each.name: each for each in host.findings(limits, probe)}


def checked(*prefix: str, before: str = "") -> tuple[int, dict]:
    """Exit code and object of `check --json` in a child process."""
    command = [*prefix, sys.executable, "-c", CHECK.format(before=before)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    return result.returncode, json.loads(result.stdout)


def by_name(answer: dict) -> dict[str, dict]:
    return {each["name"]: each for each in answer["findings"]}


@pytest.fixture(scope="session")
def may_mount() -> None:
    """A mount namespace of its own, so that /dev/shm can be replaced in a child."""
    try:
        subprocess.run(["unshare", "-m", "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to make a mount namespace: run as root")


class TestThisHost:
    def test_names_are_unique_and_failures_have_remedies(self):
        found = host.findings()
        assert len({each.name for each in found}) == len(found)
        assert all(each.ok == (each.remedy is None) for each in found)

    @pytest.mark.uffd
    def test_serves_everything(self):
        host.require_host(kernel_faults=True)

    def test_limits_are_this_processs(self):
        limits = Limits.read()
        assert limits.kernel == os.uname().release
        assert limits.cpus == len(os.sched_getaffinity(0))
        assert limits.mem_available is not None
        stat = os.statvfs("/dev/shm")
        assert limits.shm is not None
        assert (limits.shm.size or 0) == stat.f_blocks * stat.f_frsize

    def test_a_process_limit_is_found(self):
        before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))"
        if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
            pytest.skip("this process has a limit on file size already")
        finding = by_name(checked(before=before)[1])["process limits"]
        assert not finding["ok"]
        assert "ulimit -f is 1.0 GiB" in finding["detail"]

    @pytest.mark.uffd
    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
    def test_another_user_gets_user_mode_only(self):
        if Limits.read().unprivileged_uffd != 0:
            pytest.skip("vm.unprivileged_userfaultfd lets everybody have a full one")
        device = Path("/dev/userfaultfd")
        if not device.exists() or device.stat().st_mode & 0o006:
            pytest.skip("needs a /dev/userfaultfd (Linux >= 6.1) that is root's alone")
        before = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
        code, answer = checked(before=before)
        found = by_name(answer)
        assert found["userfaultfd"]["ok"]
        assert "UFFD_USER_MODE_ONLY" in found["userfaultfd"]["detail"]
        assert found["COPY/ZEROPAGE/WAKE"]["ok"]
        finding = found["kernel-mode faults"]
        assert (finding["ok"], finding["required"]) == (False, False)
        assert "user-mode-only is enough for plain processes" in finding["detail"]
        assert finding["remedy"].startswith("sysctl vm.unprivileged_userfaultfd=1 or setfacl")
        assert f"u:{NOBODY}:rw /dev/userfaultfd" in finding["remedy"]
        assert (code == ExitCode.COMPLETED) == answer["ok"]

    @pytest.mark.usefixtures("may_mount")
    def test_a_tiny_shm_fails_the_check(self):
        mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "
        code, answer = checked("unshare", "-m", "sh", "-c", mount + '"$@"', "sh")
        assert (code, answer["ok"]) == (ExitCode.HOST, False)
        finding = by_name(answer)["/dev/shm space"]
        assert finding["required"]
        assert finding["detail"] == "8 MiB free of 8 MiB"
        assert finding["remedy"] == "mount -o remount,size=1024M /dev/shm"

    @pytest.mark.usefixtures("may_mount")
    def test_the_remedy_for_shm_mends_it(self):
        script = """
import subprocess
from sharded_pc.errors import HostError
from sharded_pc.host import require_memory
subprocess.run("mount -t tmpfs -o size=8m tmpfs /dev/shm", shell=True, check=True)
try:
    require_memory(32 << 20)
except HostError as error:
    subprocess.run(str(error).split("; ")[1], shell=True, check=True)
    require_memory(32 << 20)
    print("mended", error)
"""
        command = ["unshare", "-m", sys.executable, "-c", script]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.startswith("mended 33554432 bytes (32 MiB) of shared memory needed")


class TestDescribedHosts:
    def test_a_roomy_one_passes(self):
        host.require_host(kernel_faults=True, limits=ROOMY, probe=ABLE)
        assert all(each.ok for each in described().values() if each.name != "qemu")

    @pytest.mark.parametrize(
        ("changes", "name", "detail", "remedy"),
        [
            ({"kernel": "4.9.0"}, "linux", "4.9.0", "boot Linux 4.11"),
            ({"kernel": ""}, "linux", "unknown", "boot Linux 4.11"),
            ({"page_bytes": 65536}, "page size", "65536 bytes", "4096 bytes"),
            ({"shm": None}, "/dev/shm", "not there", "mount -t tmpfs"),
            ({"shm": Shm("ext4", True, GIB, GIB)}, "/dev/shm", "on ext4", "mount -t tmpfs"),
            ({"shm": Shm(None, True, GIB, GIB)}, "/dev/shm", "no mount", "mount -t tmpfs"),
            ({"shm": Shm("tmpfs", False, GIB, GIB)}, "/dev/shm", "not writable", "remount,rw"),
            (
                {"shm": Shm("tmpfs", True, 64 * MIB, 15 * MIB)},
                "/dev/shm space",
                "15 MiB free of 64 MiB",
                "mount -o remount,size=1073M /dev/shm",
            ),
            (
                {"cgroup": Cgroup("/sys/fs/cgroup/a/memory.max", 64 * MIB, 60 * MIB)},
                "memory",
                "4 MiB available in the cgroup of /sys/fs/cgroup/a/memory.max",
                f"echo {GIB + 60 * MIB} > /sys/fs/cgroup/a/memory.max",
            ),
            ({"mem_available": MIB}, "memory", "1 MiB available", "stop other programs"),
            ({"max_map_count": 8192}, "vm.max_map_count", "8192", "sysctl vm.max_map_count="),
        ],
        ids=lambda value: str(value)[:24] if isinstance(value, dict) else "",
    )
    def test_what_is_required_fails(self, changes, name, detail, remedy):
        finding = described(**changes)[name]
        assert (finding.ok, finding.required) == (False, True)
        assert detail in finding.detail
        assert remedy in finding.remedy
        with pytest.raises(HostError) as caught:
            host.require_host(limits=dataclasses.replace(ROOMY, **changes), probe=ABLE)
        assert str(caught.value) == f"{name}: {finding.detail}; {finding.remedy}"

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"shm": Shm("tmpfs", True, 64 * MIB, 64 * MIB)}, "/dev/shm space"),
            ({"mem_available": 512 * MIB}, "memory"),
            ({"mem_available": None}, "memory"),
            ({"address_space": GIB}, "process limits"),
            ({"file_size": GIB}, "process limits"),
        ],
        ids=str,
    )
    def test_what_is_scant_is_only_told(self, changes, name):
        finding = described(**changes)[name]
        assert (finding.ok, finding.required) == (False, False)
        assert finding.remedy
        host.require_host(limits=dataclasses.replace(ROOMY, **changes), probe=ABLE)

    def test_an_unlimited_tmpfs_is_no_trouble(self):
        shm = Shm("tmpfs", True, None, None)
        assert described(shm=shm)["/dev/shm space"].ok
        host.require_memory(10 * GIB, dataclasses.replace(ROOMY, shm=shm))

    def test_no_qemu_is_only_told(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        finding = described()["qemu"]
        assert (finding.ok, finding.required) == (False, False)
        assert "qemu-system-x86" in finding.remedy


class TestUserfaultfd:
    def test_user_only_without_a_device(self):
        info = dataclasses.replace(USER_ONLY.info, device_errno=errno.ENOENT)
        finding = described(Probe(info, IOCTLS))["kernel-mode faults"]
        assert "/dev/userfaultfd: No such file or directory" in finding.detail
        expected = "sysctl vm.unprivileged_userfaultfd=1 or run with CAP_SYS_PTRACE"
        assert finding.remedy == expected

    def test_user_only_is_enough_unless_the_kernel_touches_ram(self):
        host.require_host(limits=ROOMY, probe=USER_ONLY)
        with pytest.raises(HostError, match=r"^kernel-mode faults: not served"):
            host.require_host(kernel_faults=True, limits=ROOMY, probe=USER_ONLY)

    @pytest.mark.parametrize(
        ("err", "remedy"),
        [
            (errno.ENOSYS, "boot a kernel with CONFIG_USERFAULTFD=y"),
            (errno.EPERM, "docker run --device /dev/userfaultfd"),
            (errno.EINVAL, "sysctl vm.unprivileged_userfaultfd=1"),
        ],
        ids=errno.errorcode.get,
    )
    def test_none_at_all(self, err, remedy):
        reason = f"open a userfaultfd: {os.strerror(err)}"
        found = described(Probe(None, errno=err, error=reason))
        assert found["userfaultfd"].detail == reason
        assert remedy in found["userfaultfd"].remedy
        failed = {name for name, each in found.items() if each.required and not each.ok}
        assert failed == {"userfaultfd", "MISSING_SHMEM", "COPY/ZEROPAGE/WAKE"}

    @pytest.mark.parametrize(
        ("name", "required"),
        [("MISSING_SHMEM", True), ("MINOR_SHMEM", False), ("THREAD_ID", False)],
    )
    def test_a_missing_feature(self, name, required):
        info = dataclasses.replace(ABLE.info, features=ABLE.info.features & ~FEATURES[name])
        finding = described(Probe(info, IOCTLS))[name]
        assert (finding.ok, finding.required) == (False, required)
        assert "boot Linux" in finding.remedy

    def test_missing_ioctls_are_named(self):
        probe = dataclasses.replace(ABLE, ioctls=1 << 3, error="register: Invalid argument")
        finding = described(probe)["COPY/ZEROPAGE/WAKE"]
        assert not finding.ok
        assert finding.detail.startswith("ZEROPAGE, WAKE missing on shared memory: register")


class TestRequireMemory:
    @pytest.mark.parametrize(
        ("needed", "changes", "text"),
        [
            (
                7 * GIB,
                {},
                "7516192768 bytes (7.0 GiB) of shared memory needed,"
                " 6442450944 bytes (6.0 GiB) available in /dev/shm;"
                " mount -o remount,size=9216M /dev/shm",
            ),
            (
                2 * GIB,
                {"mem_available": GIB},
                "2147483648 bytes (2.0 GiB) of shared memory needed,"
                " 1073741824 bytes (1.0 GiB) available in the machine;"
                " stop other programs or use a host with more memory",
            ),
            (
                2 * GIB,
                {"cgroup": Cgroup("/c/memory.max", 3 * GIB, 2 * GIB)},
                "2147483648 bytes (2.0 GiB) of shared memory needed,"
                " 1073741824 bytes (1.0 GiB) available in the cgroup of /c/memory.max;"
                " echo 4294967296 > /c/memory.max"
                " (or what sets it: systemd's MemoryMax=, docker's --memory)",
            ),
        ],
        ids=["shm", "machine", "cgroup"],
    )
    def test_names_both_numbers_and_the_remedy(self, needed, changes, text):
        with pytest.raises(HostError) as caught:
            host.require_memory(needed, dataclasses.replace(ROOMY, **changes))
        assert str(caught.value) == text

    def test_exactly_fits(self):
        host.require_memory(6 * GIB, ROOMY)

    def test_without_shm(self):
        with pytest.raises(HostError, match=r"^/dev/shm: not there; mkdir"):
            host.require_memory(1, dataclasses.replace(ROOMY, shm=None))

    def test_on_this_host(self):
        host.require_memory(4096)
        with pytest.raises(HostError, match=f"^{1 << 60} bytes"):
            host.require_memory(1 << 60)


class TestCgroups:
    V2_MOUNT = "29 23 0:26 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    V1_MOUNT = "35 31 0:31 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"

    @staticmethod
    def write(root: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    def test_every_level_binds_and_the_tightest_counts(self, tmp_path):
        group = {"memory.current": "500\n", "memory.stat": "anon 300\ninactive_file 200\n"}
        self.write(
            tmp_path,
            {
                "proc/self/mountinfo": self.V2_MOUNT.format(root="/"),
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "1000\n",
                **{f"sys/fs/cgroup/a/b/{name}": text for name, text in group.items()},
                **{f"sys/fs/cgroup/a/{name}": text for name, text in group.items()},
            },
        )
        file = str(tmp_path / "sys/fs/cgroup/a/memory.max")
        limits = Limits.read(tmp_path)
        assert limits.cgroup == Cgroup(file, 1000, 300)
        assert limits.cgroup.available == 700

    def test_version_1_in_a_container(self, tmp_path):
        folder = "sys/fs/cgroup/memory"
        self.write(
            tmp_path,
            {
                "proc/self/mountinfo": self.V1_MOUNT.format(root="/docker/x"),
                "proc/self/cgroup": "5:cpu:/elsewhere\n4:memory:/docker/x/y\n0::/\n",
                f"{folder}/memory.limit_in_bytes": "800",
                f"{folder}/memory.usage_in_bytes": "100",
                f"{folder}/y/memory.limit_in_bytes": "9223372036854771712",
                f"{folder}/y/memory.usage_in_bytes": "100",
            },
        )
        file = str(tmp_path / folder / "memory.limit_in_bytes")
        assert list(cgroups(tmp_path)) == [Cgroup(file, 800, 100)]

    def test_a_path_outside_the_mount_leaves_the_mount_point(self, tmp_path):
        self.write(
            tmp_path,
            {
                "proc/self/mountinfo": self.V2_MOUNT.format(root="/docker/x"),
                "proc/self/cgroup": "0::/elsewhere\n",
                "sys/fs/cgroup/memory.max": "800",
                "sys/fs/cgroup/memory.current": "900",
            },
        )
        assert [group.available for group in cgroups(tmp_path)] == [0]

    def test_an_empty_root_has_nothing(self, tmp_path):
        limits = Limits.read(tmp_path)
        assert (limits.shm, limits.cgroup, limits.mem_available) == (None, None, None)
        with pytest.raises(HostError, match="linux: release unknown"):
            host.require_host(limits=limits, probe=ABLE)


class TestShm:
    @pytest.mark.parametrize(
        ("mounts", "fstype"),
        [
            ("24 1 0:5 / / rw - ext4 /dev/vda rw\n", "ext4"),
            (
                "1 1 0:5 / / rw - ext4 /dev/vda rw\n"
                "2 1 0:6 / /dev rw - devtmpfs d rw\n"
                "3 2 0:7 / /dev/shm rw,nosuid shared:4 - tmpfs tmpfs rw,size=100k\n"
                "4 2 0:8 / /dev/shmem rw - xfs x rw\n",
                "tmpfs",
            ),
            (
                "3 2 0:7 / /dev/shm rw - tmpfs tmpfs rw\n4 3 0:8 / /dev/shm rw - ext4 x rw\n",
                "ext4",
            ),
            ("", None),
        ],
        ids=["root only", "mounted", "covered", "no mounts"],
    )
    def test_type_of_the_last_longest_mount(self, tmp_path, mounts, fstype):
        TestCgroups.write(tmp_path, {"proc/self/mountinfo": mounts, "dev/shm/x": ""})
        shm = Shm.read(tmp_path)
        assert shm is not None
        assert shm.fstype == fstype


class TestTable:
    def test_marks_and_remedies(self):
        found = [
            Finding("one", True, True, "here", None),
            Finding("second", False, True, "gone", "get it"),
            Finding("third", False, False, "slow", "hurry"),
        ]
        assert check.as_table(False, found).splitlines() == [
            "ok    one     here",
            "FAIL  second  gone",
            "              remedy: get it",
            "info  third   slow",
            "              remedy: hurry",
            "",
            "this host cannot receive: see FAIL",
        ]

    def test_json_is_one_object(self):
        found = [Finding("one", False, True, "gone", "get it")]
        assert json.loads(check.as_json(False, found)) == {
            "ok": False,
            "findings": [
                {
                    "name": "one",
                    "ok": False,
                    "required": True,
                    "detail": "gone",
                    "remedy": "get it",
                }
            ],
        }
