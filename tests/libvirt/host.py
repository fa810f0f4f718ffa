"""One host: a libvirtd and what it starts, in mount and PID namespaces of their own.

When its first process ends, and that is as soon as this one closes a pipe or dies, the kernel kills
all the others: no QEMU is left over, whatever a test did.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.libvirt import rooms, settings
from tests.libvirt.network import Network
from tests.qemu import VmError, wait_until
from tests.qemu.backports import QemuBinary

TIMEOUT_S = 40.0
ITS_OWN = ("cat", "libvirtd", "sh -c ps", "ps -eo")
"""Command lines of a host without domains."""
NOISE = re.compile("ethtool|At least one cgroup controller")
"""Errors that mean nothing: there are network devices outside, and no cgroups are wanted."""
DAEMON_PID = "/run/libvirtd.pid"


class VirshError(VmError):
    """virsh ended with an error; ``said`` is its text."""

    def __init__(self, said: str, log: str) -> None:
        super().__init__(f"{said}\nthe log's last errors:\n{log}")
        self.said = said


class Host:
    """``folder`` is its own; ``number`` (0..9) tells it from others of the same network.

    ``qemu`` is added to qemu.conf.  Use as a context manager: libvirtd answers inside.
    """

    def __init__(
        self, folder: Path, number: int, network: Network, binary: QemuBinary,
        qemu: Mapping[str, settings.Value] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self._network, self._binary = folder, network, binary
        self.uri = f"qemu+unix:///system?socket={folder}/run/libvirt/libvirt-sock"
        for name in rooms.OURS:
            (folder / name).mkdir(parents=True)
        (folder / "run" / rooms.HERE).mkdir()
        self.log.parent.mkdir()
        uuid = f"{number}aaaaaaa-0000-4000-8000-000000000000"
        ports = {"migration_port_min": 49200 + 100 * number}
        ports["migration_port_max"] = ports["migration_port_min"] + 99
        settings.write(folder / "etc", uuid, {**ports, **(qemu or {})})
        for each in Path("/etc").iterdir():
            if not (folder / "etc" / each.name).exists():
                (folder / "etc" / each.name).symlink_to(f"/run/{rooms.HERE}/{each.name}")
        self._init: subprocess.Popen[str]

    def __enter__(self) -> Host:
        script = rooms.script(self.folder, self._binary)
        command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork"]
        command = ["nsenter", f"--net={self._network.path}", *command, "--mount-proc"]
        self._init = subprocess.Popen(
            [*command, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert self._init.stdout is not None
            if self._init.stdout.readline() != "ready\n":
                raise VmError("the host's namespaces could not be made")
            self.start_daemon()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._init.stdin is not None and self._init.stdout is not None
        self._init.stdin.close()
        self._init.wait(TIMEOUT_S)
        self._init.stdout.close()

    # --- processes ---

    def inside(self, *command: str) -> list[str]:
        """The command as one that runs in this host; its process here is nsenter."""
        (first,) = _children(self._init.pid)
        namespaces = ["--mount", "--pid", "--net", "--root", "--wd=/"]
        return ["nsenter", f"--target={first}", *namespaces, "--", *command]

    def run(self, *command: str) -> str:
        """Runs it in this host to its end; what it prints."""
        done = subprocess.run(
            self.inside(*command), capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if done.returncode:
            raise VmError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def kill(self, pid: int, how: str = "KILL") -> None:
        """Signals a process by its number in this host."""
        self.run("kill", f"-{how}", str(pid))

    def processes(self, text: str) -> list[int]:
        """Numbers in this host of processes that have this in their command line, oldest first."""
        order = ("--sort", "start_time,pid")
        listing = self.run("ps", "-ww", "-eo", "pid,args", *order, "--no-headers")
        lines = (line.split(None, 1) for line in listing.splitlines())
        return [int(pid) for pid, args in lines if text in args and not args.startswith("ps ")]

    def left(self) -> list[str]:
        """What domains have left: processes, and files in /dev/shm."""
        lines = self.run("sh", "-c", "ps -eo args --no-headers; ls -A /dev/shm").splitlines()
        return [each for each in lines if not each.startswith(ITS_OWN)]

    def qemu(self, domain: str) -> int:
        """The number in this host that libvirt has for a domain's QEMU."""
        return int((self.folder / f"run/libvirt/qemu/{domain}.pid").read_text())

    # --- libvirtd ---

    def start_daemon(self) -> None:
        """Returns when it answers, as ``--daemon`` does."""
        self.run("libvirtd", "--daemon", "--pid-file", DAEMON_PID)

    def stop_daemon(self, how: str = "KILL") -> None:
        """Ends libvirtd, not its domains."""
        pid = int((self.folder / DAEMON_PID.removeprefix("/")).read_text())
        self.kill(pid, how)
        wait_until(lambda: pid not in self.processes("libvirtd"), "libvirtd's end")

    def restart_daemon(self, how: str = "KILL") -> None:
        self.stop_daemon(how)
        self.start_daemon()

    def virsh(self, *words: object, timeout: float = TIMEOUT_S) -> str:
        """What virsh prints; VirshError with what it says if it fails."""
        return self.finish(self.start_virsh(*words), timeout)

    def start_virsh(self, *words: object) -> subprocess.Popen[str]:
        """For ``finish``, while something else is done."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            _virsh(self.uri, *words), stdin=subprocess.DEVNULL, text=True, **pipes
        )

    def finish(self, process: subprocess.Popen[str], timeout: float = TIMEOUT_S) -> str:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise VirshError(f"no end in {timeout:g} s: {process.args}", self._errors()) from None
        if process.returncode:
            raise VirshError(err.strip(), self._errors())
        return out

    def locked_by(self, domain: str) -> int:
        """Who has the lock of a domain's pid file, which libvirt lets QEMU keep; 0: nobody."""
        program = (
            "import fcntl, struct, sys; lock = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0); "
            "found = fcntl.fcntl(open(sys.argv[1], 'r+'), fcntl.F_GETLK, lock); "
            "print(struct.unpack('hhqqi4x', found)[-1])"
        )
        return int(self.run(sys.executable, "-c", program, f"/run/libvirt/qemu/{domain}.pid"))

    def destroy(self, domain: str) -> None:
        """Nothing is left of it, if it is here.  Not by libvirt's way: a QEMU whose guest waits for
        a page takes no SIGTERM, which libvirt waits ten seconds for."""
        if domain in self.virsh("list", "--name", "--all").split():
            self.kill(self.qemu(domain))
            wait_until(
                lambda: domain not in self.virsh("list", "--name", "--all").split(),
                f"{domain}'s end", TIMEOUT_S,
            )  # fmt: skip

    # --- what was said ---

    @property
    def log(self) -> Path:
        return self.folder / settings.LOG.removeprefix("/var/")

    def qmp(self, since: int = 0) -> Iterator[dict[str, Any]]:
        """What QEMUs have said on their monitors, from this offset of the log on."""
        with self.log.open("rb") as file:
            file.seek(since)
            for found in re.finditer(rb" : Line \[(\{.*\})\]", file.read()):
                yield json.loads(found[1])

    def statuses(self, since: int = 0) -> list[str]:
        """Of the MIGRATION events among that."""
        events = (each for each in self.qmp(since) if each.get("event") == "MIGRATION")
        return [each["data"]["status"] for each in events]

    def log_size(self) -> int:
        return self.log.stat().st_size

    def _errors(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(
            [each for each in lines if ": error : " in each and not NOISE.search(each)][-6:]
        )


def _virsh(uri: str, *words: object) -> list[str]:
    return ["virsh", "--quiet", "--connect", uri, *map(str, words)]


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
