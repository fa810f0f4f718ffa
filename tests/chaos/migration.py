"""One migration through chaos."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from sharded_pc.address import Address, TcpAddress, UnixAddress
from sharded_pc.address import parse as parse_address
from sharded_pc.errors import ConnectionLost
from sharded_pc.observe.view import ReceiverView
from sharded_pc.succession import looks_resumable
from sharded_pc.testing.chaos import ChaosProxy
from sharded_pc.testing.faults import ENDS, Fault, Kind, Weather
from tests.chaos import verdict
from tests.chaos.guest import Guest, Report, Task
from tests.chaos.killer import Killer
from tests.chaos.operator import GONE, OVER, PAUSED, WAITS, Operator, dial
from tests.chaos.plan import Kill, Plan
from tests.chaos.source import ChaosSource
from tests.chaos.verdict import CLEANLY, COMPLETED, Wrong
from tests.receiver import Receiver, Successor, describe

LOST = (ConnectionLost, ConnectionError)
STEP_S = 15.0
AGAIN_S = 0.05
"""How long a source whose recovery broke looks whether the receiver knows of it."""
MOST_CONNECTIONS = 60


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
        return self.outcome in (COMPLETED, CLEANLY)


class Chaos:
    """Runs a plan once."""

    def __init__(self, plan: Plan, folder: Path, guests: Sequence[Guest]) -> None:
        self._plan = plan
        self._name = f"chaos-{os.getpid()}-{plan.seed}"
        self._folder = folder
        self._guests = guests[: plan.guests]
        self.counts: collections.Counter[str] = collections.Counter()
        incoming = "tcp:127.0.0.1:0" if plan.tcp else f"unix:{folder / 'in'}"
        options = ("--placement", plan.placement.value, "--workers", str(plan.workers))
        self._arguments = (folder, self._name, incoming, *options)
        self.receiver = Receiver(*self._arguments, keep=False, control=True)
        self._last_info: dict | None = None
        """of a receiver that was killed and has no successor"""
        self._killer = Killer(self.receiver)
        self._source: ChaosSource | None = None
        self._attached = 0
        self._silenced = threading.Event()
        self._timers: list[threading.Timer] = []

    def run(self) -> tuple[str, Report]:
        """What became of it; Wrong, or another AssertionError."""
        try:
            with contextlib.ExitStack() as self._exit:
                self._exit.enter_context(self.receiver)
                self.proxy = self._exit.enter_context(self._proxy())
                self.operator = self._exit.enter_context(self._new_operator())
                self._migrate()
                self.operator.close()
                return self._judge()
        finally:
            for timer in self._timers:
                timer.cancel()
            self._killer.end()
            self._count()

    def _new_operator(self) -> contextlib.closing[Operator]:
        return contextlib.closing(Operator(self.receiver, self._folder, self._plan.tcp))

    def _successor(self) -> Successor:
        return Successor(*self._arguments, keep=False, control=True)

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
                self._source = ChaosSource(sock, self._plan)
                self._begin(self._source)
            else:
                self._source.resume(sock)
                self._source.repeat(self._plan.leg(number).again)
            self.operator.wait_guests(self._attached)
            try:
                self._source.end()
            finally:
                self._source.hang_up()

    def _begin(self, source: ChaosSource) -> None:
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
            self.proxy.drop()  # not before: it would be heard
        status = self._hear_of_it()
        if status == GONE and self._killer.has_killed_receiver:
            return self._succeed()
        if status in (*OVER, GONE):
            return True
        return self._recover() if status == PAUSED else False

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

    def _recover(self, *, kills: bool = True) -> bool:
        """As _is_over()."""
        self.counts["pauses"] += 1
        leg = self._plan.leg(self.counts["pauses"])
        for kill in leg.kills if kills else ():
            self._killer.kill(kill)
        self.counts["mistakes"] += len(leg.mistakes)
        try:
            self.proxy.target = self.operator.recover(leg.mistakes)
        except ConnectionError:
            if self._killer.has_killed_receiver:
                return self._succeed()
            raise
        return False

    def _succeed(self) -> bool:
        """As _is_over(), of a receiver that was killed: if its guest ran, another takes over."""
        self.receiver._started().wait(STEP_S)
        if not looks_resumable(self._name):
            with ReceiverView(self._name) as view:
                self._last_info = view.info()
            self._killer.let_go_on()
            return True
        self.receiver = self._exit.enter_context(self._successor())
        self._killer.receive_by(self.receiver)
        self.operator = self._exit.enter_context(self._new_operator())
        self.operator.take_up()
        return self._recover(kills=False)

    # The end

    def _judge(self) -> tuple[str, Report]:
        if self._last_info is None:
            info = verdict.told(self.receiver.finish(STEP_S))
            broke = any(fault.kind in ENDS for _, fault in self.proxy.happened)
        else:
            info, broke = self._last_info, True
        self.counts["restarts"] += sum(shard["restarts"] for shard in info["sharded"]["shards"])
        if verdict.of_receiver(info, broke=broke) == CLEANLY:
            return CLEANLY, Report()
        return COMPLETED, verdict.of_guests(self._guests[: self._attached], STEP_S)

    def _count(self) -> None:
        self.counts.update(fault.kind.value for _, fault in self.proxy.happened if not fault.note)
        self.counts["coordinators"] = self._killer.coordinators
        self.counts.update({name.lower(): n for name, n in self._killer.sent.items()})


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
    if outcome != COMPLETED:
        for guest in guests:
            guest.kill()
        guests.clear()
    return Result(plan.seed, outcome, detail, time.monotonic() - since, chaos.counts, report)


def _check_nothing_left(chaos: Chaos, folder: Path) -> None:
    """Receiver.finish() has looked for processes, sockets and shared memory."""
    if processes := chaos.receiver.processes():
        raise Wrong(f"left processes: {describe(processes)}")
    logs = {f"{chaos.receiver.name}.{suffix}" for suffix in ("stdout", "stderr")}
    left = {path for path in folder.iterdir() if path.name not in logs}
    if chaos.counts["coordinators"]:
        left = {path for path in left if not path.is_socket()}  # SIGKILL leaves where it listened
    if left:
        raise Wrong(f"left files: {left}")
