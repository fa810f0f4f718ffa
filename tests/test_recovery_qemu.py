"""A real QEMU's migration whose wire is cut while the guest runs here, and its recovery."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import wait_until
from tests.qemu.guest_image import MIB
from tests.qemu.vm import QmpConnection
from tests.receiver import Resumes
from tests.runner import Runner
from tests.test_run_qemu import Pair, check_goes_on, check_missing, check_plain, pair

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(120),
    pytest.mark.usefixtures("placement"),
]  # fmt: skip


class Operator:
    """Whoever speaks to both ends' control sockets."""

    def __init__(self, vms: Pair, path: Path) -> None:
        self.vms = vms
        self.control = QmpConnection(path)
        self._numbers = itertools.count()

    def status(self) -> str:
        return self.control.execute("query-migrate", {})["status"]

    def wait(self, *statuses: str) -> None:
        wait_until(lambda: self.status() in statuses, f"one of {statuses}")

    def cut(self, by: str) -> None:
        """`migrate-pause` at one end is a shutdown(2) of the wire: the other end sees it closed."""
        if by == "source":
            self.vms.source.qmp("migrate-pause")
        else:
            self.control.execute("migrate-pause", {})
        self.vms.source.wait_migration("postcopy-paused")
        self.wait("postcopy-paused")

    def recover(self, uri: str | None = None) -> None:
        """Both go on, over TCP if nothing else is said."""
        uri = uri or f"unix:{self.vms.runner.folder}/again{next(self._numbers)}"
        self.control.execute("migrate-recover", {"uri": uri})
        self.vms.source.migrate(self.real(uri), resume=True)
        self.wait("postcopy-active", "completed")

    def real(self, uri: str) -> str:
        """With the port that was chosen."""
        if not uri.endswith(":0"):
            return uri
        said = self.vms.runner.stderr()
        return said.rpartition("the source may go on at ")[2].split()[0]


@contextlib.contextmanager
def operated(
    folder: Path, name: str, binary, *options: str,
    prepare: Callable[[Pair], None] = lambda vms: None, **both,
) -> Iterator[Operator]:  # fmt: skip
    """A guest that runs here with nearly all of its RAM at the source."""
    path = folder / "control"
    with pair(folder, name, binary, options=("--control", str(path), *options), **both) as vms:
        prepare(vms)
        vms.resume()
        check_missing(vms.runner.look())
        operator = Operator(vms, path)
        try:
            yield operator
        finally:
            operator.control.close()


def check_end(operator: Operator) -> None:
    """Everything comes, every word is right, the source has completed, nothing is left."""
    vms = operator.vms
    info = vms.complete()
    assert (info["status"], info["error-desc"]) == ("completed", None)
    vms.source.wait_migration("completed")
    check_goes_on(vms)
    check_plain(vms)
    vms.end()


@pytest.mark.parametrize("by", ["source", "receiver"])
def test_cut_and_recovered_twice(tmp_path, unique_name, binary, by):
    with operated(tmp_path, unique_name, binary) as operator:
        for _ in range(2):
            operator.cut(by)
            check_missing(operator.vms.runner.look(), 0.3)
            operator.recover()
        check_end(operator)


def test_over_tcp_with_two_processors(tmp_path, unique_name, binary):
    with operated(tmp_path, unique_name, binary, smp=2) as operator:
        for by in ("source", "receiver"):
            operator.cut(by)
            operator.recover("tcp:127.0.0.1:0")
        check_end(operator)


def test_the_source_comes_again_unasked(tmp_path, unique_name, binary):
    """Management that only retries `migrate resume=true` speaks to no control socket of ours."""
    uri = f"unix:{tmp_path}/again"
    with operated(tmp_path, unique_name, binary, "--recover-uri", uri) as operator:
        for _ in range(2):
            operator.vms.source.qmp("migrate-pause")
            operator.vms.source.wait_migration("postcopy-paused")
            operator.wait("postcopy-recover-setup")
            operator.vms.source.migrate(uri, resume=True)
            operator.wait("postcopy-active", "completed")
        check_end(operator)


def test_cut_while_recovering(tmp_path, unique_name, binary):
    """The source meets somebody who closes at once, then the receiver."""
    with operated(tmp_path, unique_name, binary) as operator:
        operator.cut("receiver")
        source = operator.vms.source
        if binary.version >= (9,):  # an older one has no way out of a failure in recovery (8.2)
            source.qmp("migrate", uri="unix:/nobody", resume=True)
            source.wait_migration("postcopy-paused")
        operator.recover()
        operator.control.execute("migrate-pause", {})
        operator.wait("postcopy-paused")
        source.wait_migration("postcopy-paused")
        operator.recover()
        check_end(operator)


def test_handshake_with_nobody(tmp_path, unique_name, binary):
    """Each end meets somebody who says nothing (QEMU's double-failures/handshake): both are kicked
    out of it, and a good recovery follows."""
    if binary.version < (9,):
        pytest.skip("n/a: an older source has no way out of a failure in recovery")
    with operated(tmp_path, unique_name, binary) as operator, contextlib.ExitStack() as stack:
        operator.cut("receiver")
        source = operator.vms.source
        silent = stack.enter_context(socket.socket(socket.AF_UNIX))
        silent.bind(f"{tmp_path}/silent")
        silent.listen()
        source.migrate(f"unix:{tmp_path}/silent", resume=True)
        source.wait_migration("postcopy-recover")
        operator.control.execute("migrate-recover", {"uri": f"unix:{tmp_path}/here"})
        stranger = stack.enter_context(socket.socket(socket.AF_UNIX))
        stranger.connect(f"{tmp_path}/here")
        operator.wait("postcopy-recover-setup")
        source.qmp("migrate-pause")
        source.wait_migration("postcopy-paused")
        operator.recover()
        check_end(operator)


def test_the_guest_goes_on_while_paused(tmp_path, unique_name, binary):
    """On what it has; and it is the guest that had been waiting which goes on afterwards."""
    with operated(tmp_path, unique_name, binary) as operator:
        operator.cut("receiver")
        assert operator.vms.guest.run_state() == "running"
        assert operator.vms.guest.wrong_words() == []
        operator.recover()
        check_end(operator)


def test_a_source_that_dies(tmp_path, unique_name, binary):
    """What it had is gone: the guest stays, paused, until the operator ends it."""
    with operated(tmp_path, unique_name, binary) as operator:
        vms = operator.vms
        vms.source.kill()
        operator.wait("postcopy-paused")
        assert vms.guest.run_state() == "running"
        info = operator.control.execute("query-migrate", {})
        assert info["ram"]["remaining"] > 32 * MIB
        pages = sum(n for spans in info["sharded"]["missing"].values() for _, n in spans)
        assert pages * 4096 == info["ram"]["remaining"]
        os.kill(vms.runner.pid, signal.SIGTERM)
        assert vms.runner.finish().exit_code == 143


def test_a_guest_that_dies_while_paused(tmp_path, unique_name, binary):
    """Exit code 6, at once: nothing is left to recover."""
    with operated(tmp_path, unique_name, binary) as operator:
        operator.cut("receiver")
        os.kill(operator.vms.guest.pid, signal.SIGKILL)
        assert operator.vms.runner.finish().exit_code == 6


# --- the receiver dies ---


class Successor(Resumes, Runner):
    """`run --resume NAME`."""


def kill(runner: Runner, *, workers: bool) -> None:
    shards = [shard["pid"] for shard in runner.look()["sharded"]["shards"]]
    for pid in [runner.pid, *(shards if workers else ())]:
        os.kill(pid, signal.SIGKILL)
    runner._started().wait()


@pytest.mark.parametrize("workers", [False, True], ids=["the coordinator", "everything"])
def test_a_killed_receiver_is_resumed(tmp_path, unique_name, binary, workers):
    """QEMU lives on, its guest waits and never reads zeros; the successor adopts it."""
    with operated(tmp_path, unique_name, binary) as operator:
        vms, dead = operator.vms, operator.vms.runner
        qemu = vms.guest.pid
        kill(dead, workers=workers)
        vms.source.wait_migration("postcopy-paused")
        assert vms.guest.run_state() == "running"
        with Successor(
            tmp_path, unique_name, vms.guest, "--control", f"{tmp_path}/c2"
        ) as vms.runner:
            assert vms.guest.pid == qemu
            operator.control.close()
            operator.control = QmpConnection(tmp_path / "c2")
            operator.wait("postcopy-paused")
            operator.recover()
            check_end(operator)
            outcome = vms.runner.finish()
            assert outcome.exit_code == 0
            assert "its exit code is not known" in outcome.stderr
        dead._outcome = vms.runner._outcome


def test_a_guest_that_dies_while_its_receiver_is_away(tmp_path, unique_name, binary):
    with operated(tmp_path, unique_name, binary) as operator:
        vms, dead = operator.vms, operator.vms.runner
        qemu = vms.guest.pid
        kill(dead, workers=True)
        os.kill(qemu, signal.SIGKILL)
        wait_until(lambda: not dead.processes(), "the end of all processes")
        vms.runner = Successor(tmp_path, unique_name, vms.guest)
        outcome = vms.runner.run_to_end()
        assert outcome.exit_code == 6
        assert f"QEMU (pid {qemu}) has ended while its receiver was away" in outcome.stderr
        dead._outcome = outcome
