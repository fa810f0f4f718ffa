"""One migration through chaos, and its verdict.

It may end in two ways only.  The receiver has completed, and no guest has seen a wrong byte; or the
connection broke before the guest ran here, and the receiver failed and said so: then the source's
guest goes on.  Either way nothing is left behind.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import random
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from sharded_pc.address import Address, TcpAddress, UnixAddress
from sharded_pc.address import parse as parse_address
from sharded_pc.errors import ConnectionLost
from sharded_pc.testing.chaos import ChaosProxy
from sharded_pc.testing.faults import ENDS, Fault, Kind, Weather
from tests.chaos.guest import Guest, Report, Task
from tests.chaos.killer import Killer
from tests.chaos.operator import OVER, PAUSED, WAITS, Operator, dial
from tests.chaos.plan import Kill, Leg, Plan
from tests.receiver import Outcome, Receiver, describe
from tests.synthetic import StepSource

LOST = (ConnectionLost, ConnectionError, BrokenPipeError)
STEP_S = 15.0
AGAIN_S = 0.05
"""How long a source whose recovery broke looks whether the receiver knows of it."""
MOST_CONNECTIONS = 60
BEFORE_RUN = ("none", "advise", "discard", "listening")


class Wrong(AssertionError):
    """What must not happen."""


@dataclasses.dataclass(slots=True)
class Result:
    seed: int
    outcome: str
    """a line"""
    detail: str
    """all that is known if it is not right"""
    seconds: float
    counts: collections.Counter[str]
    report: Report

    @property
    def is_right(self) -> bool:
        return self.outcome in ("completed", "failed cleanly")


class Chaos:
    """Runs a plan once."""

    def __init__(self, plan: Plan, folder: Path, guests: Sequence[Guest]) -> None:
        self._plan = plan
        self._name = f"chaos-{os.getpid()}-{plan.seed}"
        self._folder = folder
        self._guests = guests[: plan.guests]
        self.counts: collections.Counter[str] = collections.Counter()
        incoming = "tcp:127.0.0.1:0" if plan.tcp else f"unix:{folder / 'in'}"
        self.receiver = Receiver(
            folder, self._name, incoming, "--placement", plan.placement.value, "--workers",
            str(plan.workers), keep=False, control=True,
        )  # fmt: skip
        self._killer = Killer(self.receiver)
        self._source: _Source | None = None
        self._attached = 0
        self._silenced = threading.Event()
        self._timers: list[threading.Timer] = []

    def run(self) -> tuple[str, Report]:
        """What became of it; Wrong, or another AssertionError."""
        plan = self._plan
        try:
            with self.receiver, self._proxy() as self.proxy:
                self.operator = Operator(self.receiver, self._folder, plan.tcp)
                with contextlib.closing(self.operator):
                    self._migrate()
                return self._judge(self.receiver.finish(STEP_S))
        finally:
            for timer in self._timers:
                timer.cancel()
            self._killer.end()
            self._count()

    def _proxy(self) -> ChaosProxy:
        near: Address = UnixAddress(str(self._folder / "near"))
        if self._plan.tcp:
            near = TcpAddress("127.0.0.1", 0)
        far = parse_address(self.receiver.uri())
        return ChaosProxy(near, far, self._weather, self._on_fault)

    def _weather(self, number: int) -> Weather:
        return self._plan.leg(number).weather

    def _on_fault(self, number: int, fault: Fault) -> None:
        """On the proxy's thread."""
        if isinstance(fault.note, Kill):
            self._killer.kill(fault.note)
        elif fault.kind is Kind.SILENCE:
            timer = threading.Timer(fault.seconds, self._notice_silence)
            self._timers.append(timer)
            timer.start()

    def _notice_silence(self) -> None:
        """The operator at the source says migrate-pause there."""
        self._silenced.set()
        if self._source is not None:
            self._source.hang_up()

    # The source's way

    def _migrate(self) -> None:
        """Until the source is done, or the receiver."""
        for number in range(MOST_CONNECTIONS):
            try:
                self._connect(number)
                return
            except LOST:
                if self._is_over():
                    return
        raise Wrong(f"no end after {MOST_CONNECTIONS} connections")

    def _connect(self, number: int) -> None:
        """The source's next connection, up to its end."""
        with dial(self.proxy.address) as sock:
            sock.settimeout(STEP_S)
            if self._source is None:
                self._source = _Source(sock, self._plan)
                self._begin(self._source)
            else:
                self._source.resume(sock)
                self._source.repeat(self._plan.leg(number).again)
            self.operator.wait_guests(self._attached)
            try:
                self._source.end()
            finally:
                self._source.hang_up()

    def _begin(self, source: _Source) -> None:
        """Through the switch.  A guest that comes too late would see nothing of it all."""
        early = max(self._plan.guests - 1, 1)
        self._attach(0, early)
        source.set_up()
        self.operator.wait_guests(early)
        source.precopy()
        source.switch()
        self._attach(early, self._plan.guests)

    def _attach(self, first: int, end: int) -> None:
        plan = self._plan
        for number in range(first, end):
            path = str(self.receiver.attach_path)
            task = Task(path, plan.oracle, number, plan.guests, plan.pace_s)
            self._guests[number].go(task)
        self._attached = end

    def _is_over(self) -> bool:
        """The connection broke.  False: the source may come again."""
        if self._silenced.is_set():
            self._silenced.clear()
            self.operator.pause()
            self.proxy.drop()
        status = self._hear_of_it()
        if status in (*OVER, "gone"):
            return True
        if status == PAUSED:
            self._recover(self._plan.leg(self._connections))
        return False

    def _hear_of_it(self) -> str:
        """What the receiver is when it has noticed.  A connection that broke before its first word
        is none: it awaits the source as before."""
        deadline = time.monotonic() + STEP_S
        while time.monotonic() < deadline:
            if status := self.operator.hear((PAUSED,), AGAIN_S):
                return status
            if self.operator.status == WAITS:
                return WAITS
        raise Wrong(f"the connection broke, and {STEP_S:g} s later it is {self.operator.status}")

    @property
    def _connections(self) -> int:
        return self.operator.pauses + 1

    def _recover(self, leg: Leg) -> None:
        for kill in leg.kills:
            self._killer.kill(kill)
        self.counts["mistakes"] += len(leg.mistakes)
        self.proxy.target = self.operator.recover(leg.mistakes)

    # The end

    def _judge(self, outcome: Outcome) -> tuple[str, Report]:
        info = outcome.info
        if info is None:
            raise Wrong(f"the receiver ended with {outcome.exit_code} and told nothing")
        self.counts["restarts"] = sum(s["restarts"] for s in info["sharded"]["shards"])
        if info["status"] == "completed":
            if outcome.exit_code != 0 or info["ram"]["remaining"]:
                raise Wrong(f"completed with exit code {outcome.exit_code}, {info['ram']}")
            return "completed", self._hear_guests()
        if info["postcopy-state"] not in BEFORE_RUN:
            raise Wrong(f"the guest ran, and yet: {info['status']}, {info['error-desc']}")
        if not self._broken():
            raise Wrong(f"nothing broke, and yet: {info['error-desc']}")
        return "failed cleanly", Report()

    def _broken(self) -> bool:
        return any(fault.kind in ENDS for _, fault in self.proxy.happened)

    def _hear_guests(self) -> Report:
        reports = [guest.report(STEP_S) for guest in self._guests[: self._attached]]
        for report in reports:
            if report is None:
                raise Wrong("a guest waits for ever")
            if report.wrong or report.failed:
                raise Wrong(f"a guest: {report.wrong or report.failed}")
        return Report(sum(r.visits for r in reports), sum(r.written for r in reports))

    def _count(self) -> None:
        self.counts["pauses"] = self.operator.pauses
        self.counts.update(fault.kind.value for _, fault in self.proxy.happened if not fault.note)
        self.counts.update({name.lower(): n for name, n in self._killer.sent.items()})


class _Source(StepSource):
    """StepSource that may be hung up from another thread, and repeats itself."""

    def __init__(self, sock: socket.socket, plan: Plan) -> None:
        super().__init__(sock, plan.oracle, bandwidth=plan.bandwidth)
        self._draw = random.Random(f"{plan.seed}/source")

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self.back._thread:
            self.back._thread.join(STEP_S)

    def repeat(self, share: float) -> None:
        """Pages that were received once more: guests keep what they wrote."""
        for block, missing in enumerate(self._missing):
            here = [page for page, flag in enumerate(missing) if not flag]
            if count := int(len(here) * share):
                self.again(block, sorted(self._draw.sample(here, count)))


def run(plan: Plan, guests: list[Guest]) -> Result:
    """Runs it; guests that hang afterwards, or may, are renewed in the list."""
    while len(guests) < plan.guests:
        guests.append(Guest())
    since = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(plan, Path(folder), guests)
        try:
            (outcome, report), detail = chaos.run(), ""
            _check_nothing_left(chaos, Path(folder))
        except (AssertionError, OSError) as error:
            outcome, report = f"WRONG {type(error).__name__}: {error}".splitlines()[0], Report()
            detail = "".join([*traceback.format_exception(error), chaos.receiver.stderr()])
    if outcome != "completed":
        for guest in guests:
            guest.kill()
        guests.clear()
    return Result(plan.seed, outcome, detail, time.monotonic() - since, chaos.counts, report)


def _check_nothing_left(chaos: Chaos, folder: Path) -> None:
    """Receiver.finish() has looked for processes, sockets and shared memory."""
    if processes := chaos.receiver.processes():
        raise Wrong(f"left processes: {describe(processes)}")
    logs = {f"{chaos.receiver.name}.{suffix}" for suffix in ("stdout", "stderr")}
    if left := {path.name for path in folder.iterdir()} - logs:
        raise Wrong(f"left files: {left}")
