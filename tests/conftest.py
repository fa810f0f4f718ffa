"""What holds for every test: nothing is left behind, and what CI must run was not skipped.

``SHARDED_PC_REQUIRE=qemu,uffd`` in the environment makes a skip of a test with one of these marks a
failure, unless its reason begins with ``n/a:``: what it lacks is not what the mark stands for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sharded_pc import shm
from sharded_pc.geometry import Placement
from sharded_pc.shards import watch
from tests.libvirt.domain import Domain
from tests.libvirt.pair import Pair, lacking, pair
from tests.qemu import WaitTimeout, backports, wait_until
from tests.qemu.backports import QemuBinary
from tests.receiver import describe, marked_processes

SESSION = "SHARDED_PC_TEST_SESSION"
"""In the environment of all processes of a test run: its number."""
LEFT_S = 5.0
DOMAIN_LEFT_S = 30.0
OURS = re.compile(r".*(%control|%pool|%bitmaps)")
OF_A_RUN = re.compile(r"t[0-9a-f]{8}-")
_REQUIRED = {name for name in os.environ.get("SHARDED_PC_REQUIRE", "").split(",") if name}
_BEFORE = pytest.StashKey[set[str]]()
_numbers = itertools.count()


# --- QEMU ---

NO_QEMU = pytest.mark.skip(reason=f"no QEMU: install {backports.PACKAGES[0]}")


@pytest.fixture(params=backports.available_qemus() or [pytest.param(None, marks=NO_QEMU)], ids=str)
def binary(request: pytest.FixtureRequest) -> QemuBinary:
    """Every QEMU there is."""
    return request.param


@pytest.fixture
def newer() -> QemuBinary:
    """A QEMU that under TCG loses no dirty page of a guest that writes during precopy."""
    if found := backports.newer_qemu():
        return found
    pytest.skip("n/a: needs QEMU >= 10: python -m tests.qemu.backports fetch")


# --- libvirt ---


@pytest.fixture(scope="session")
def hosts() -> Iterator[Pair]:
    """Two libvirtd, for a test worker; xdist_group("libvirt") asks that only one has them."""
    if why := lacking():
        pytest.skip(why)
    with pair() as found:
        yield found


@pytest.fixture
def domain(hosts: Pair) -> Iterator[Domain]:
    """A domain for this test, on no host yet; nothing of it is anywhere afterwards."""
    with _domains(hosts, 1) as (domain,):
        yield domain


@pytest.fixture
def four_domains(hosts: Pair) -> Iterator[list[Domain]]:
    """As `domain`."""
    with _domains(hosts, 4) as domains:
        yield domains


@contextlib.contextmanager
def _domains(hosts: Pair, count: int) -> Iterator[list[Domain]]:
    # Sockets in /tmp have the name: it is not that of another worker's domain.
    name = f"guest-{os.environ.get('PYTEST_XDIST_WORKER', '')}-"
    domains = [Domain(f"{name}{next(_numbers)}", hosts.image) for _ in range(count)]
    try:
        yield domains
    finally:
        for host in (hosts.a, hosts.b):
            for domain in domains:
                host.destroy(domain.name)
            what = f"nothing left, but: {host.left()}"
            wait_until(lambda host=host: not host.left(), what, DOMAIN_LEFT_S)


# --- skips ---


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    marks = sorted(_REQUIRED & {mark.name for mark in item.iter_markers()})
    if not report.skipped or not marks or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith("n/a:"):
        report.outcome = "failed"
        report.longrepr = f"SHARDED_PC_REQUIRE={','.join(marks)} and yet: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """A module may skip itself before its tests can be seen."""
    report = yield
    if report.skipped and isinstance(collector, pytest.Module):
        source = collector.path.read_text()
        if marks := sorted(name for name in _REQUIRED if f"mark.{name}" in source):
            report.outcome = "failed"
            report.longrepr = f"SHARDED_PC_REQUIRE={','.join(marks)} and yet: {report.longrepr[2]}"
    return report


# --- leaks ---


@pytest.fixture
def new_name() -> Iterator[Callable[[], str]]:
    """Makes receiver names that nobody else has; what stands under them must be gone at the end."""
    prefix = f"{_run_prefix()}{os.getpid()}-{next(_numbers)}"
    numbers = itertools.count()
    yield lambda: f"{prefix}-{next(numbers)}"
    left = [name for name in os.listdir(shm.ROOT) if name.startswith(f"{prefix}-")]
    for name in left:
        (shm.ROOT / name).unlink(missing_ok=True)
    assert not left, f"left in {shm.ROOT}: {left}"


@pytest.fixture
def unique_name(new_name: Callable[[], str]) -> str:
    """One of them."""
    return new_name()


@pytest.fixture(autouse=True)
def _no_process_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set up first, so torn down last: whatever the test started has had its chance to end."""
    starts_some = any(request.node.get_closest_marker(name) for name in ("qemu", "uffd"))
    before = _children() if starts_some else set()
    yield
    if not starts_some:
        return
    try:
        wait_until(lambda: _children() <= before, "the end of child processes", LEFT_S)
    except WaitTimeout as error:
        pytest.fail(f"{error}: {describe(sorted(_children() - before))}")


def _run_prefix() -> str:
    return f"t{os.environ[SESSION]}-"


def _children() -> set[int]:
    """Our child processes, without zombies that nobody has waited for yet."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return {pid for pid in pids if _is_child(pid)} - {_resource_tracker()}


def _is_child(pid: int) -> bool:
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return int(parent) == os.getpid() and state not in "ZX"


def _resource_tracker() -> int | None:
    """multiprocessing's, which lives as long as we do once something needed it."""
    from multiprocessing import resource_tracker

    return getattr(resource_tracker._resource_tracker, "_pid", None)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[SESSION] = uuid.uuid4().hex[:8]
        config.stash[_BEFORE] = set(os.listdir(shm.ROOT))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where it all began (not in xdist's workers, which have ended by now)."""
    if hasattr(session.config, "workerinput"):
        return
    before = session.config.stash[_BEFORE]
    problems = []
    for what, find in {
        "shared memory": lambda: _leftovers(before),
        "processes": lambda: describe(_marked()),
    }.items():
        try:
            wait_until(lambda find=find: not find(), what, LEFT_S)
        except WaitTimeout:
            problems.append(f"this test run left {what}: {find()}")
    if problems:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        for line in problems:
            reporter.write_line(line, red=True)


def _marked() -> list[int]:
    pids = marked_processes(SESSION, os.environ[SESSION])
    return [pid for pid in pids if pid not in (os.getpid(), _resource_tracker())]


def _leftovers(before: set[str]) -> list[str]:
    """Files of receivers; not those of another test run at the same time, nor a live receiver's."""
    alive = {found.name for found in shm.receivers() if found.alive}
    new = [name for name in sorted(set(os.listdir(shm.ROOT)) - before) if OURS.fullmatch(name)]
    return [
        name for name in new
        if name.startswith(_run_prefix())
        or not (OF_A_RUN.match(name) or name.rpartition("%")[0] in alive)
    ]  # fmt: skip


@pytest.fixture(params=list(Placement))
def placement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Placement:
    """Both ways of placing pages, for every receiver that the test starts."""
    monkeypatch.setattr("tests.synthetic.PLACEMENT", request.param)
    monkeypatch.setattr("tests.receiver.PLACEMENT", ("--placement", request.param.value))
    return request.param


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether a worker is stopped: the test says when it dies."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 3600)
