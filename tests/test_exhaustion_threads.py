"""No more threads, in a worker or in the coordinator: named, and nothing is lost.

Two ways: a cgroup's limit of processes (as root, where one may be made), and a limit of the address
space (RLIMIT_AS) that holds no more stacks, which any user can have.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc.threads import REMEDY
from tests.cgroups import cgroup
from tests.control import Control
from tests.guest_process import GuestFailed, GuestProcess
from tests.qemu import wait_until
from tests.receiver import Receiver
from tests.synthetic import WAIT_S, StepSource, connect, open_source

pytestmark = [pytest.mark.uffd]

LESS_THAN_A_STACK = 3 << 20


@contextlib.contextmanager
def by_address_space(pid: int, name: str) -> Iterator[None]:
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + LESS_THAN_A_STACK, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_AS, before)


@contextlib.contextmanager
def by_cgroup(pid: int, name: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("n/a: makes a cgroup, as root")
    with cgroup("pids", name) as group:
        group.add(pid)
        group.limit(group.used())
        yield
        group.unlimit()
        (group.folder.parent / "cgroup.procs").write_text(str(pid))


@pytest.fixture(params=[by_address_space, by_cgroup], ids=["address space", "pids"])
def no_threads(request):
    return request.param


@contextlib.contextmanager
def begun(folder: Path, name: str) -> Iterator[tuple[Receiver, StepSource, Control]]:
    receiver = Receiver(folder, name, None, "--workers", "1", control=True, keep=False)
    with receiver, open_source(connect(receiver.uri())) as source:
        source.begin()
        source.wait_switched()
        with contextlib.closing(Control(receiver.control_path)) as control:
            yield receiver, source, control


def worker_pid(control: Control) -> int:
    return control.execute("query-migrate")["sharded"]["shards"][0]["pid"]


def recover(receiver: Receiver, source: StepSource, control: Control, again: int) -> None:
    uri = f"unix:{receiver.folder / f'again{again}'}"
    assert control.execute("migrate-recover", uri=uri) == {}
    with contextlib.closing(connect(uri)) as sock:
        source.resume(sock)
        source.end()
        assert receiver.finish().exit_code == 0


@pytest.mark.usefixtures("placement")
def test_a_worker_has_no_thread_for_a_guest(tmp_path, unique_name, no_threads):
    """The guest is refused with the reason, and may come again; the worker stays."""
    with begun(tmp_path, unique_name) as (receiver, source, control), GuestProcess() as guest:
        pid, attach = worker_pid(control), str(receiver.attach_path)
        with no_threads(pid, unique_name), pytest.raises(GuestFailed) as caught:
            guest.ask("attach", attach)
        assert "thread 'faults-0'" in caught.value.text and REMEDY in caught.value.text
        assert worker_pid(control) == pid
        guest.ask("attach", attach)
        source.end()
        assert receiver.finish().exit_code == 0
        assert guest.ask("visit_all") == []


@pytest.mark.usefixtures("placement")
def test_the_coordinator_has_no_thread_for_a_recovery(tmp_path, unique_name):
    """Paused again, with the reason.  (The C library keeps the stack of a thread that has ended: a
    limit of the address space would not do.)"""
    with begun(tmp_path, unique_name) as (receiver, source, control):
        control.execute("migrate-pause")
        control.wait_status("postcopy-paused")
        uri = f"unix:{tmp_path / 'first'}"
        with by_cgroup(receiver.pid, unique_name):
            assert control.execute("migrate-recover", uri=uri) == {}
            with contextlib.closing(connect(uri)) as sock, contextlib.suppress(Exception):
                source.resume(sock)
            info = control.wait_status("postcopy-paused")
        assert "start thread" in info["error-desc"] and REMEDY in info["error-desc"]
        recover(receiver, source, control, 2)


def test_no_process_for_a_successor(tmp_path, unique_name):
    """The spare dies too, and neither a worker nor a spare can be started."""
    with begun(tmp_path, unique_name) as (receiver, source, control):
        whole = 4  # coordinator, worker, spare, multiprocessing's resource tracker
        wait_until(lambda: len(receiver.processes()) == whole, "the spare", WAIT_S)
        with by_cgroup(receiver.pid, unique_name):
            first = worker_pid(control)
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: worker_pid(control) != first, "the spare", WAIT_S)
            os.kill(worker_pid(control), signal.SIGKILL)
            why = control.wait_status("postcopy-paused")["error-desc"]
        assert why.startswith("start a worker for shard 0: ") and REMEDY in why
        recover(receiver, source, control, 1)
