"""``sharded-pc-emulator`` in QEMU's place, a test in libvirt's: it starts it as libvirt does and
says what libvirt said (``data/``: libvirt 9.0.0, recorded)."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from sharded_pc.testing.certificates import HOST
from tests.certificates import certificates
from tests.emulator import Emulated, is_qemu
from tests.qemu import wait_until
from tests.qemu.backports import QemuBinary, distribution_qemu
from tests.qemu.guest_image import MIB, write_image
from tests.qemu.vm import QemuVm
from tests.test_receive_qemu import begin_precopy, switch

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90)]

MEMORY_MIB = 32
RATE = 4 * MIB
WAIT_S = 30.0
RECORDING = Path(__file__).parent / "data" / "libvirt-recover.qmp.gz"


class Libvirt:
    """A client of QEMU's monitor that takes down what it hears."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(WAIT_S)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb")
        self.statuses: list[str] = []
        """of MIGRATION events that nobody has waited for"""
        assert "QMP" in self._hear()

    def close(self) -> None:
        self._lines.close()
        self._sock.close()

    def _hear(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "QEMU's monitor is closed"
        message = json.loads(line)
        if message.get("event") == "MIGRATION":
            self.statuses.append(message["data"]["status"])
        return message

    def say(self, command: dict[str, Any]) -> dict[str, Any]:
        """Its reply, which is the next there is."""
        self._sock.sendall(json.dumps(command).encode())
        while "event" in (reply := self._hear()):
            pass
        assert reply.get("id") == command.get("id")
        return reply

    def ask(self, name: str, **arguments: Any) -> Any:
        reply = self.say({"execute": name, "arguments": arguments, "id": name})
        assert "return" in reply, reply
        return reply["return"]

    def negotiate(self) -> None:
        self.ask("qmp_capabilities")
        wish = {"capability": "events", "state": True}
        self.ask("migrate-set-capabilities", capabilities=[wish])

    def wait(self, status: str) -> None:
        """The next status is this one."""
        while not self.statuses:
            self._hear()
        assert self.statuses.pop(0) == status


def recorded() -> Iterator[tuple[str, dict[str, Any]]]:
    """("->" or "<-", message) of the conversation, greetings left out."""
    lines = gzip.decompress(RECORDING.read_bytes()).decode().splitlines()
    for _, way, text in (line.split(maxsplit=2) for line in lines):
        if way in ("->", "<-"):
            yield way, json.loads(text)


@contextlib.contextmanager
def migrating(
    folder: Path, name: str, binary: QemuBinary, *, writes: bool = False, **emulated: Any
) -> Iterator[tuple[QemuVm, Emulated]]:
    """A source whose guest has filled its memory, and where it is to go."""
    image = write_image(folder / "guest.img", MEMORY_MIB, writes=writes)
    both = {"binary": binary, "memory_mib": MEMORY_MIB, "image": image}
    vm = Emulated(folder, name, **both, **emulated)
    with QemuVm(folder, "src", **both) as source:
        source.wait_serial("F")
        try:
            yield source, vm
        finally:
            vm.kill()


def check_lives(vm: QemuVm) -> None:
    vm.wait_passes(2)
    assert vm.wrong_words() == []


class TestRecordedConversation:
    """A migration that is paused and recovered, word for word as libvirt said it."""

    def test_replay(self, tmp_path, unique_name):
        binary = distribution_qemu()
        if binary is None or binary.version[:2] != (7, 2):
            pytest.skip("n/a: QEMU 7.2 was recorded")
        with migrating(tmp_path, unique_name, binary) as (source, vm):
            pid = vm.launch().pid
            libvirt = Libvirt(vm.monitor_path)
            with contextlib.closing(libvirt):
                Replay(libvirt, source, vm, f"unix:{tmp_path}/in").run()
                assert vm.pid == pid and is_qemu(pid)
                check_lives(vm)
                vm.wait_gone()
                threads = [each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/comm")]
                assert not [name for name in threads if name.startswith("sharded-pc")]
                self.check_monitor_is_qemus(libvirt, tmp_path)

    def check_monitor_is_qemus(self, libvirt: Libvirt, folder: Path) -> None:
        """The guest is saved as any other."""
        found = {
            each["capability"]: each["state"] for each in libvirt.ask("query-migrate-capabilities")
        }
        assert [name for name, on in found.items() if on] == ["events"]
        libvirt.ask("migrate-set-parameters", **{"max-bandwidth": 0, "downtime-limit": 2000})
        libvirt.ask("migrate", uri=f"exec:cat > {folder}/state")
        for status in ("setup", "active", "completed"):
            libvirt.wait(status)
        assert (folder / "state").stat().st_size > 0.9 * MEMORY_MIB * MIB


class Replay:
    """Says what was said, when what had been heard before is heard again."""

    def __init__(self, libvirt: Libvirt, source: QemuVm, vm: Emulated, uri: str) -> None:
        self._libvirt, self._source, self._vm, self._uri = libvirt, source, vm, uri
        self._recovers = False

    def run(self) -> None:
        asked: dict[str, dict[str, Any]] = {}
        for way, message in recorded():
            if way == "->":
                asked[message["id"]] = self._libvirt.say(self._ours(message))
                self._after(message["execute"])
            elif message.get("event") == "MIGRATION":
                self._heard(message["data"]["status"])
            elif "id" in message and "return" in message:
                assert "return" in asked[message["id"]], (message, asked[message["id"]])

    def _ours(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["execute"] in ("migrate-incoming", "migrate-recover"):
            return {**message, "arguments": {"uri": self._uri}}
        return message

    def _after(self, command: str) -> None:
        source = self._source
        if command == "migrate-incoming":
            begin_precopy(source, self._uri)
        elif command == "cont":
            wait_until(lambda: self._vm.look()["postcopy-state"] == "running", "the switch")
            source.qmp("migrate-pause")
            source.wait_migration("postcopy-paused")
        elif command == "migrate-recover":
            self._recovers = True
            source.migrate(self._uri, resume=True)

    def _heard(self, status: str) -> None:
        # 7.2 says `setup` again at migrate-recover, where we say `postcopy-recover` already
        if status != "setup" or not self._recovers:
            self._libvirt.wait(status)
        if status == "active":
            switch(self._source, postcopy_rate=RATE)
        if status == "postcopy-active" and self._recovers:
            self._source.set_parameters(max_postcopy_bandwidth=0)


class TestPlace:
    def test_without_incoming(self, tmp_path, unique_name, newer):
        """It is QEMU from the start."""
        image = write_image(tmp_path / "guest.img", MEMORY_MIB)
        vm = Emulated(
            tmp_path, unique_name, incoming=None, binary=newer, memory_mib=MEMORY_MIB, image=image
        )
        try:
            vm.start()
            assert is_qemu(vm.pid) and not vm.receivers()
            assert vm.run_state() == "prelaunch"
        finally:
            vm.kill()

    @pytest.mark.parametrize("words", [["-version"], ["-machine", "help"]], ids=" ".join)
    def test_what_libvirt_asks_first(self, tmp_path, unique_name, newer, words):
        vm = Emulated(tmp_path, unique_name, incoming=None, binary=newer)
        environment = newer.full_environment()
        try:
            ours, theirs = (
                subprocess.check_output([program, *newer.args, *words], env=environment)
                for program in (vm.command()[0], newer.path)
            )
            assert ours == theirs
        finally:
            vm.kill()

    def test_incoming_on_the_command_line(self, tmp_path, unique_name, newer):
        """As people start a destination; nobody says migrate-incoming."""
        uri = f"unix:{tmp_path}/in"
        with migrating(tmp_path, unique_name, newer, writes=True, incoming=uri) as (source, vm):
            vm.start()
            begin_precopy(source, uri)
            switch(source, postcopy_rate=RATE)
            vm.qmp("cont")
            vm.wait_event("RESUME")
            assert vm.look()["postcopy-state"] in ("listening", "running")
            source.set_parameters(max_postcopy_bandwidth=0)
            source.wait_migration("completed")
            check_lives(vm)
            vm.wait_gone()

    def test_stands_aside(self, tmp_path, unique_name, newer):
        """QEMU takes the migration by itself, and the log says why."""
        uri, settings = f"unix:{tmp_path}/in", 'guests = ["other-*"]'
        more = {"incoming": uri, "settings": settings}
        with migrating(tmp_path, unique_name, newer, **more) as (source, vm):
            vm.start()
            (line,) = [each for each in vm.stderr().splitlines() if "stands aside" in each]
            assert "is none of `guests`" in line
            wait_until(lambda: not vm.receivers(), "the receiver's end")
            begin_precopy(source, uri, postcopy=False, rate=0)
            source.wait_migration("completed")
            vm.qmp("cont")
            check_lives(vm)

    @pytest.mark.parametrize(
        ("settings", "extra", "why"),
        [
            ('least-memory = "1G"', [], "least-memory in sharded-pc.toml is larger"),
            ("", ["-overcommit", "mem-lock=on"], "cannot be locked"),
            ("worker = 1", [], "no key 'worker'"),
        ],
        ids=["memory", "refused", "file"],
    )
    def test_strict(self, tmp_path, unique_name, newer, settings, extra, why):
        """Nobody takes it then; libvirt shows what stands in the log."""
        settings = f"strict = true\n{settings}"
        vm = Emulated(tmp_path, unique_name, settings=settings, binary=newer, extra=extra)
        try:
            assert vm.launch().wait_exit() == 1
            assert why in vm.stderr()
        finally:
            vm.kill()


class TestReceiverKilled:
    def test_in_postcopy(self, tmp_path, unique_name, newer):
        """Its guest waits, who manages it hears of a pause, another receiver takes it up."""
        uri = f"unix:{tmp_path}/in"
        with migrating(tmp_path, unique_name, newer, writes=True) as (source, vm):
            vm.launch()
            with contextlib.closing(Libvirt(vm.monitor_path)) as libvirt:
                libvirt.negotiate()
                libvirt.ask("migrate-incoming", uri=uri)
                begin_precopy(source, uri)
                switch(source, postcopy_rate=RATE)
                libvirt.ask("cont")
                for status in ("setup", "active", "postcopy-active"):
                    libvirt.wait(status)
                wait_until(lambda: vm.look()["postcopy-state"] == "running", "the switch")
                os.kill(vm.receiver(), signal.SIGKILL)
                libvirt.wait("postcopy-paused")
                assert libvirt.ask("query-migrate")["status"] == "postcopy-paused"
                source.wait_migration("postcopy-paused")
                libvirt.ask("migrate-recover", uri=uri)
                source.set_parameters(max_postcopy_bandwidth=0)
                source.migrate(uri, resume=True)
                for status in ("postcopy-recover", "postcopy-active"):
                    libvirt.wait(status)
                libvirt.wait("completed")
                check_lives(vm)
                vm.wait_gone()
                assert libvirt.ask("query-status")["status"] == "running"
            assert "killed by signal 9, another one takes its place" in vm.stderr()


class TestManagement:
    """What it is told at QEMU's monitor."""

    def test_tls(self, tmp_path, unique_name, newer):
        """It ends in the receiver; QEMU has the parameter when its guest runs, so a receiver that
        takes a dead one's place does too, and if it cannot have TLS it takes nobody without."""
        uri, creds = f"unix:{tmp_path}/in", {"qom-type": "tls-creds-x509", "verify-peer": True}
        with migrating(tmp_path, unique_name, newer, writes=True) as (source, vm):
            vm.launch()
            with contextlib.closing(Libvirt(vm.monitor_path)) as libvirt:
                libvirt.negotiate()
                folder = shutil.copytree(certificates() / "server", tmp_path / "server")
                libvirt.ask("object-add", id="tls0", dir=str(folder), endpoint="server", **creds)
                reply = libvirt.say(
                    {"execute": "migrate-set-parameters", "arguments": {"tls-creds": "tls1"}}
                )
                assert "tls1" in reply["error"]["desc"]
                libvirt.ask("migrate-set-parameters", **{"tls-creds": "tls0"})
                libvirt.ask("migrate-incoming", uri=uri)
                client = str(certificates() / "client")
                source.qmp("object-add", id="tls0", dir=client, endpoint="client", **creds)
                source.set_parameters(tls_creds="tls0", tls_hostname=HOST)
                begin_precopy(source, uri)
                switch(source, postcopy_rate=RATE)
                libvirt.ask("cont")
                wait_until(lambda: vm.look()["postcopy-state"] == "running", "the switch")
                key = (folder / "server-key.pem").rename(folder / "away")
                os.kill(vm.receiver(), signal.SIGKILL)
                source.wait_migration("postcopy-paused")
                reply = libvirt.say({"execute": "migrate-recover", "arguments": {"uri": uri}})
                assert "server-key.pem" in reply["error"]["desc"]
                key.rename(folder / "server-key.pem")
                libvirt.ask("migrate-set-parameters", **{"tls-creds": "tls0"})
                libvirt.ask("migrate-recover", uri=uri)
                source.set_parameters(max_postcopy_bandwidth=0)
                source.migrate(uri, resume=True)
                source.wait_migration("completed")
                check_lives(vm)
                vm.wait_gone()

    def test_what_goes_wrong(self, tmp_path, unique_name, newer):
        """It hears why, and QEMU's monitor says so until it is ended."""
        with migrating(tmp_path, unique_name, newer) as (source, vm):
            vm.launch()
            with contextlib.closing(Libvirt(vm.monitor_path)) as libvirt:
                libvirt.negotiate()
                bad = [{"capability": "dirty-bitmaps", "state": True}]
                arguments = {"capabilities": bad}
                reply = libvirt.say({"execute": "migrate-set-capabilities", "arguments": arguments})
                assert "cannot take dirty-bitmaps" in reply["error"]["desc"]
                assert libvirt.ask("query-migrate") == {}
                reply = libvirt.say({"execute": "migrate-incoming", "arguments": {"uri": "rdma:x"}})
                assert "expected tcp:HOST:PORT" in reply["error"]["desc"]
                reply = libvirt.say({"execute": "migrate-incoming", "arguments": {"uri": "fd:3"}})
                assert "its receiver does not have it" in reply["error"]["desc"]
                uri = f"unix:{tmp_path}/in"
                libvirt.ask("migrate-incoming", uri=uri)
                assert libvirt.ask("query-migrate")["status"] == "setup"
                begin_precopy(source, uri)
                for status in ("setup", "active"):
                    libvirt.wait(status)
                source.kill()
                libvirt.wait("failed")
                answer = libvirt.ask("query-migrate")
                assert "source closed the stream" in answer["error-desc"]
                assert vm.alive()
