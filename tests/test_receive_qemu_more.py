"""A real QEMU and ``sharded-pc receive``: every transport, and everything that goes wrong.

A migration that fails in precopy leaves the source's guest running and nothing else behind.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import wait_until
from tests.qemu.guest_image import MIB
from tests.qemu.vm import QemuVm, QmpConnection
from tests.receiver import END_S, Outcome, Receiver
from tests.test_receive_qemu import (
    MEMORY_MIB,
    begin_precopy,
    booted,
    check_equal,
    check_postcopy,
    switch,
    wait_ram,
)

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90)]

# Listens on the Unix socket argv[1] (there by one rename, when it listens) and relays one
# connection, both ways, to the socket that is its standard input and output.
RELAY = """
import os, shutil, socket, sys, threading
path = sys.argv[1]
server = socket.socket(socket.AF_UNIX)
server.bind(path + "~")
server.listen()
os.rename(path + "~", path)
source, _ = server.accept()
os.unlink(path)
receiver = socket.socket(fileno=0)
def pump(a, b):
    while data := a.recv(65536):
        b.sendall(data)
    b.shutdown(socket.SHUT_WR)
back = threading.Thread(target=pump, args=(receiver, source))
back.start()
pump(source, receiver)
back.join()
"""


class TestTransports:
    def migrate(self, source: QemuVm, receiver: Receiver, uri: str) -> Outcome:
        """Precopy, postcopy, all well."""
        begin_precopy(source, uri)
        switch(source)
        outcome = receiver.finish()
        check_equal(source, receiver, outcome)
        check_postcopy(outcome.info)
        return outcome

    @pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
    def test_tcp_prints_its_port(self, tmp_path, unique_name, binary, host):
        if host == "[::1]" and not Path("/proc/net/if_inet6").exists():
            pytest.skip("n/a: no IPv6 here")
        with (
            booted(tmp_path, binary) as source,
            Receiver(tmp_path, unique_name, f"tcp:{host}:0") as receiver,
        ):
            uri = receiver.uri()
            assert uri.startswith(f"tcp:{host}:") and not uri.endswith(":0")
            self.migrate(source, receiver, uri)

    def test_fd(self, tmp_path, unique_name, binary):
        ours, theirs = socket.socketpair()
        with booted(tmp_path, binary) as source, closing(theirs):
            incoming = f"fd:{theirs.fileno()}"
            with Receiver(tmp_path, unique_name, incoming, pass_fds=[theirs.fileno()]) as receiver:
                theirs.close()  # the receiver's copy is the only one, as it is in life
                with closing(ours):
                    source._monitor()._client.send_fd_scm(ours.fileno())
                    source.qmp("getfd", fdname="mig")
                self.migrate(source, receiver, "fd:mig")

    def test_exec(self, tmp_path, unique_name, binary):
        (tmp_path / "relay.py").write_text(RELAY)
        path = tmp_path / "relay"
        command = f"exec:exec {sys.executable} {tmp_path}/relay.py {path}"
        with (
            booted(tmp_path, binary) as source,
            Receiver(tmp_path, unique_name, command) as receiver,
        ):
            wait_until(path.exists, "the relay")
            self.migrate(source, receiver, f"unix:{path}")

    def test_recording_replays(self, tmp_path, new_name, binary):
        recording = tmp_path / "recording"
        with booted(tmp_path, binary) as source:
            with Receiver(tmp_path, new_name(), None, "--record", str(recording)) as receiver:
                first = self.migrate(source, receiver, receiver.uri())
            assert recording.stat().st_size == first.info["ram"]["transferred"]
            with Receiver(tmp_path, new_name(), f"file:{recording}") as receiver:
                again = receiver.finish()
                check_equal(source, receiver, again, requests=False)
        assert again.info["postcopy-state"] == "end"
        assert again.info["ram"]["postcopy-requests"] == 0
        for key in ("total", "normal", "duplicate", "transferred", "discarded-pages"):
            assert again.info["ram"][key] == first.info["ram"][key], key

    @pytest.mark.parametrize("offset", [0, 12345])
    def test_file_that_qemu_wrote(self, tmp_path, unique_name, binary, offset):
        file = tmp_path / "stream"
        file.write_bytes(b"?" * offset)
        with booted(tmp_path, binary) as source:
            source.set_capabilities(return_path=False)
            begin_precopy(source, f"exec:cat >> {file}", postcopy=False, rate=1 << 30)
            source.wait_migration("completed")
            where = f"file:{file}" + (f",offset={offset}" if offset else "")
            with Receiver(tmp_path, unique_name, where) as receiver:
                outcome = receiver.finish()
                check_equal(source, receiver, outcome)
        assert outcome.info["postcopy-state"] == "none"

    def test_pipe(self, tmp_path, unique_name, newer):
        """As ``fd:`` in QEMU: a stream that another program brings, no way back."""
        with booted(tmp_path, newer) as source:
            file = tmp_path / "stream"
            source.set_capabilities(return_path=False)
            begin_precopy(source, f"exec:cat > {file}", postcopy=False, rate=1 << 30)
            source.wait_migration("completed")
            with file.open("rb") as stream:
                cat = subprocess.Popen(["cat"], stdin=stream, stdout=subprocess.PIPE)
            with cat, cat.stdout as pipe:
                incoming = f"fd:{pipe.fileno()}"
                with Receiver(
                    tmp_path, unique_name, incoming, pass_fds=[pipe.fileno()]
                ) as receiver:
                    check_equal(source, receiver, receiver.finish())


class TestControl:
    def events(self, control: QmpConnection) -> list[str]:
        found = []
        while event := control.take_event("MIGRATION"):
            found.append(event["data"]["status"])
        return found

    def test_events_and_queries(self, tmp_path, unique_name, binary):
        with (
            booted(tmp_path, binary) as source,
            Receiver(tmp_path, unique_name, control=True) as receiver,
        ):
            with closing(QmpConnection(receiver.control_path)) as control:
                assert control._client.greeting.QMP.version["package"] == "sharded_pc"
                assert control.execute("query-migrate", {})["status"] == "setup"
                begin_precopy(source, receiver.uri())
                wait_ram(source, "transferred", MIB)
                assert control.execute("query-migrate", {})["status"] == "active"
                switch(source, postcopy_rate=8 * MIB)
                seen = [control_status(control, "postcopy-active")]
                source.set_parameters(max_postcopy_bandwidth=0)
                seen.append(control_status(control, "completed"))
                events: list[str] = []

                def told() -> bool:  # the word is known a moment before it is told
                    events.extend(self.events(control))
                    return "completed" in events

                wait_until(told, "the last event")
            outcome = receiver.finish()
            check_equal(source, receiver, outcome)
        assert events == ["active", "postcopy-active", "completed"]
        assert seen[1]["ram"] == outcome.info["ram"]
        assert set(seen[0]) == set(outcome.info)

    def test_quit_in_precopy(self, tmp_path, unique_name, binary):
        with booted(tmp_path, binary) as source:
            with (
                Receiver(tmp_path, unique_name, control=True) as receiver,
                closing(QmpConnection(receiver.control_path)) as control,
            ):
                begin_precopy(source, receiver.uri())
                wait_ram(source, "transferred", MIB)
                control.execute("quit", {})
                outcome = receiver.finish()
            check_source_runs(source)
        assert outcome.exit_code in (0, 1)
        assert outcome.info["status"] in ("failed", "cancelled")

    def test_failure_is_told(self, tmp_path, unique_name, newer):
        with (
            booted(tmp_path, newer) as source,
            Receiver(tmp_path, unique_name, control=True) as receiver,
        ):
            with closing(QmpConnection(receiver.control_path)) as control:
                begin_precopy(source, receiver.uri())
                wait_ram(source, "transferred", MIB)
                source.qmp("migrate_cancel")
                info = control_status(control, "failed")
                assert self.events(control) == ["active", "failed"]
            outcome = receiver.finish()
        assert info["error-desc"]
        assert info["error-desc"] == outcome.info["error-desc"]


def control_status(control: QmpConnection, status: str) -> dict:
    """Waits until the receiver's migration has this status; ``query-migrate``."""

    def reached() -> dict | None:
        info = control.execute("query-migrate", {})
        return info if info["status"] == status else None

    return wait_until(reached, f"status {status}")


def check_source_runs(source: QemuVm) -> None:
    """The migration is over and its guest goes on as if nothing had been."""
    source.wait_migration("failed", "cancelled")
    assert source.run_state() == "running"
    source.wait_passes(2)
    assert source.wrong_words() == []


def check_refused(
    source: QemuVm, receiver: Receiver, code: int, *texts: str, timeout: float = END_S
) -> Outcome:
    """One error line that holds ``texts``; the source's guest runs on."""
    outcome = receiver.finish(timeout)
    check_source_runs(source)
    assert outcome.exit_code == code, receiver.error(f"exit code {outcome.exit_code}")
    assert len(outcome.errors) == 1, outcome.stderr
    assert [text for text in texts if text not in outcome.errors[0]] == [], outcome.stderr
    if outcome.info:
        assert outcome.info["status"] == "failed"
        assert outcome.errors == [f"sharded-pc: {outcome.info['error-desc']}"]
    return outcome


class TestSourceGivesUp:
    def test_cancel_in_precopy(self, tmp_path, unique_name, binary):
        with (
            booted(tmp_path, binary, writes=True) as source,
            Receiver(tmp_path, unique_name) as receiver,
        ):
            begin_precopy(source, receiver.uri())
            wait_ram(source, "transferred", MIB)
            source.qmp("migrate_cancel")
            check_refused(source, receiver, 4, "cancelled?")

    def test_source_dies_in_precopy(self, tmp_path, unique_name, newer):
        with booted(tmp_path, newer) as source, Receiver(tmp_path, unique_name) as receiver:
            begin_precopy(source, receiver.uri())
            wait_ram(source, "transferred", MIB)
            source.kill()
            outcome = receiver.finish()
        assert outcome.exit_code == 4 and len(outcome.errors) == 1

    def test_source_dies_in_postcopy(self, tmp_path, unique_name, newer):
        receiver = Receiver(tmp_path, unique_name, control=True)
        with booted(tmp_path, newer) as source, receiver:
            begin_precopy(source, receiver.uri())
            switch(source, postcopy_rate=4 * MIB)
            wait_until(lambda: receiver.status()["status"] == "postcopy-active", "postcopy")
            source.kill()
            outcome = receiver.give_up()
        assert outcome.exit_code == 5 and len(outcome.errors) == 1
        assert "pages are still there" in outcome.errors[0]

    def test_cancelled_source_migrates_again(self, tmp_path, new_name, binary):
        with booted(tmp_path, binary) as source:
            with Receiver(tmp_path, new_name()) as receiver:
                begin_precopy(source, receiver.uri())
                wait_ram(source, "transferred", MIB)
                source.qmp("migrate_cancel")
                check_refused(source, receiver, 4)
            with Receiver(tmp_path, new_name()) as receiver:
                begin_precopy(source, receiver.uri())
                switch(source)
                check_equal(source, receiver, receiver.finish())


class TestRefusals:
    """What a source may not use is named."""

    def test_switchover_ack_without_the_option(self, tmp_path, unique_name, newer):
        """The source does not switch; its guest goes on, and the receiver can be told to end."""
        with booted(tmp_path, newer) as source:
            source.set_capabilities(switchover_ack=True, return_path=True)
            with Receiver(tmp_path, unique_name) as receiver:
                begin_precopy(source, receiver.uri(), rate=1024 * MIB)
                source.set_parameters(downtime_limit=2000)
                wait_ram(source, "dirty-sync-count", 5)  # it has sent everything, again and again
                assert source.query_migrate()["status"] == "active"
                receiver.signal(signal.SIGTERM)
                assert receiver.finish().exit_code == 143
            source.wait_migration("failed")

    def test_x_ignore_shared(self, tmp_path, unique_name, binary):
        with booted(tmp_path, binary) as source:
            source.set_capabilities(x_ignore_shared=True)
            with Receiver(tmp_path, unique_name) as receiver:
                begin_precopy(source, receiver.uri(), postcopy=False)
                check_refused(source, receiver, 4, "x-ignore-shared")


class TestMemoryShort:
    SMALL = 'mount -t tmpfs -o size=32m,mode=1777 tmpfs /dev/shm && exec "$@"'
    PREFIX = ("unshare", "-m", "--propagation", "private", "sh", "-c", SMALL, "sh")

    def test_refused_when_the_block_list_arrives(self, tmp_path, unique_name, binary):
        if not may_mount(self.PREFIX):
            pytest.skip("n/a: may not mount a small /dev/shm: run as root")
        with (
            booted(tmp_path, binary) as source,
            Receiver(tmp_path, unique_name, prefix=self.PREFIX) as receiver,
        ):
            begin_precopy(source, receiver.uri())
            outcome = check_refused(source, receiver, 3)
        found = re.search(
            r"(\d+) bytes \(.*\) of shared memory needed, (\d+) bytes \(.*\) available "
            r"in /dev/shm; mount -o remount,size=(\d+)M /dev/shm",
            outcome.errors[0],
        )
        needed, available, remedy = map(int, found.groups())
        assert available < 32 * MIB < MEMORY_MIB * MIB < needed < remedy * MIB


def may_mount(prefix: tuple[str, ...]) -> bool:
    if not shutil.which(prefix[0]):
        return False
    return subprocess.run([*prefix, "true"], capture_output=True, timeout=20).returncode == 0


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=["SIGINT", "SIGTERM"])
class TestSignals:
    def test_before_a_source(self, tmp_path, unique_name, number, code):
        with Receiver(tmp_path, unique_name, control=True) as receiver:
            receiver.signal(number)
            outcome = receiver.finish()
        assert outcome.exit_code == code, outcome.stderr

    def test_in_precopy(self, tmp_path, unique_name, binary, number, code):
        with booted(tmp_path, binary) as source, Receiver(tmp_path, unique_name) as receiver:
            begin_precopy(source, receiver.uri())
            wait_ram(source, "transferred", MIB)
            receiver.signal(number)
            outcome = receiver.finish()
            check_source_runs(source)
        assert outcome.exit_code == code, outcome.stderr
        assert outcome.info["status"] != "completed"

    def test_in_postcopy(self, tmp_path, unique_name, newer, number, code):
        with booted(tmp_path, newer) as source, Receiver(tmp_path, unique_name) as receiver:
            begin_precopy(source, receiver.uri())
            switch(source, postcopy_rate=4 * MIB)
            wait_until(lambda: receiver.status()["status"] == "postcopy-active", "postcopy")
            receiver.signal(number)
            outcome = receiver.finish()
            source.wait_migration("postcopy-paused")
        assert outcome.exit_code == code, outcome.stderr
        assert outcome.info["postcopy-state"] in ("listening", "running")
