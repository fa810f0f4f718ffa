"""What happens in one migration, drawn from its seed."""

from __future__ import annotations

import dataclasses
import enum
import random

from sharded_pc.geometry import PAGE_BYTES, Placement, RamBlock
from sharded_pc.testing.faults import BOTH, Fault, Kind, Way, Weather
from sharded_pc.testing.oracle import runs
from sharded_pc.wire import writer
from tests.synthetic import ChangingOracle

RECORD_BYTES = PAGE_BYTES + 8
BREAKS = (0, 1, 1, 2, 2, 2, 3, 3, 4, 5)
"""How many times the connection breaks."""
KILLS = (0, 1, 2, 2, 3, 3, 4)
COORDINATOR_KILLS = (0, 1, 1, 2)
COORDINATOR_SIGNALS = ("KILL", "KILL", "SEGV", "SEGV", "STOP")
SIGNALS = ("KILL", "KILL", "KILL", "SEGV", "STOP", "STOP")
ENDS = (Kind.CUT, Kind.CUT, Kind.CUT, Kind.RESET, Kind.RESET, Kind.SILENCE)
MISTAKES = ("nonsense", "nowhere", "elsewhere", "stranger", "knock")
"""What an operator, and who else can reach the address, does wrong before it goes well."""


ALL, SPARE, COORDINATOR, EVERYTHING = "all", "spare", "coordinator", "everything"


class Victims(enum.StrEnum):
    NONE = "none"
    WORKERS = "workers"
    ALL = "all"
    """coordinators, and whole receivers"""


@dataclasses.dataclass(frozen=True, slots=True)
class Kill:
    """A signal; a worker that was stopped goes on after `stopped_s`, or is left."""

    whom: int | str
    """a shard's worker, ALL of them at once, SPARE, all that wait for the day they are needed, the
    COORDINATOR, or EVERYTHING of a receiver"""
    signal: str
    stopped_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Leg:
    """One connection of the source, and what is done before it."""

    weather: Weather
    mistakes: tuple[str, ...] = ()
    kills: tuple[Kill, ...] = ()
    """while there is no connection"""
    again: float = 0.0
    """share of the pages that the source sends once more although they were received"""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    placement: Placement
    workers: int
    tcp: bool
    oracle: ChangingOracle
    bandwidth: float | None
    guests: int
    """the last of several comes after the switch"""
    pace_s: float
    """a guest's rest between two batches of pages"""
    legs: tuple[Leg, ...]

    def leg(self, number: int) -> Leg:
        """Fine weather behind the last one: the migration must end some time."""
        return self.legs[number] if number < len(self.legs) else Leg(Weather())


def plan_of(
    seed: int, *, victims: Victims = Victims.WORKERS, placement: Placement | None = None
) -> Plan:
    """The same for the same arguments; with fewer victims what remains is the same."""
    draw = random.Random(f"chaos/{seed}")
    drawn = draw.choice(list(Placement))
    workers, oracle = draw.choice((1, 2, 2, 2, 3)), _oracle(draw, seed)
    tcp, guests = draw.random() < 0.4, draw.choice((1, 1, 1, 2))
    bandwidth = draw.choice((None, 10e6, 30e6))
    pace_s = draw.choice((0.0002, 0.001, 0.005))
    count = draw.choice(KILLS)
    dealer = _Legs(draw, oracle, workers)
    legs = dealer.legs(0 if victims is Victims.NONE else count)
    if victims is Victims.ALL:
        legs = dealer.kill_coordinators(legs, draw.choice(COORDINATOR_KILLS))
    return Plan(
        seed, placement or drawn, workers, tcp, oracle, bandwidth, guests, pace_s, tuple(legs)
    )


def _oracle(draw: random.Random, seed: int) -> ChangingOracle:
    """Blocks of one to five stripes, one of them smaller than a stripe."""
    sizes = {"pc.ram": draw.randint(256, 1280), "vga.vram": draw.randint(64, 512)}
    if draw.random() < 0.5:
        sizes["pc.bios"] = draw.randint(1, 64)
    return ChangingOracle(
        tuple(RamBlock(name, pages * PAGE_BYTES) for name, pages in sizes.items()),
        seed=seed,
        zero_share=draw.uniform(0, 0.4),
        dirty_share=draw.uniform(0.1, 0.9),
        turned_share=draw.uniform(0, 0.1),
    )


class _Legs:
    """Deals faults to connections.  Where the switch is on the wire is known about."""

    def __init__(self, draw: random.Random, oracle: ChangingOracle, workers: int) -> None:
        self._draw = draw
        self._workers = workers
        blocks = range(len(oracle.blocks))
        changed = [
            bytes(b != a for a, b in zip(oracle.precopied(n), oracle.final(n), strict=True))
            for n in blocks
        ]
        ranges = sum(1 for flags in changed for _ in runs(flags))
        self._switch = sum(_bytes(oracle.precopied(n)) for n in blocks) + 20 * ranges + 500
        """about behind how many bytes the guest runs at the destination"""
        self._behind = sum(
            _bytes(bytes(v for v, c in zip(oracle.final(n), changed[n], strict=True) if c))
            for n in blocks
        )
        """bytes that postcopy takes at least"""
        words = sum(len(writer.recv_bitmap(block.name)) for block in oracle.blocks)
        self._handshake = words + len(writer.postcopy_resume())
        self._bitmaps = sum(block.pages // 8 + 40 for block in oracle.blocks)

    def legs(self, kills: int) -> list[Leg]:
        """One in ten breaks before its guest runs, or about then."""
        early = self._draw.random()
        if early < 0.05:
            legs = [self._leg(self._draw.randrange(self._switch)), self._leg()]
        elif early < 0.1:
            near = self._switch // 50 + 1000
            legs = [self._leg(self._switch + self._draw.randint(-near, near)), self._leg()]
        else:
            legs = self._late()
        legs = [legs[0], *map(self._troubled, legs[1:])]
        for _ in range(kills):
            number = self._draw.randrange(len(legs))
            start = self._switch if number == 0 else 0
            legs[number] = self._with_kill(legs[number], start, self._kill())
        return legs

    def _late(self) -> list[Leg]:
        """Each connection brings its share of what is missing."""
        breaks = self._draw.choice(BREAKS)
        marks = sorted(self._draw.randrange(self._behind) for _ in range(breaks))
        shares = [end - start for start, end in zip([0, *marks], marks, strict=False)]
        first = self._switch + 1500
        legs = [self._leg(share + (0 if number else first)) for number, share in enumerate(shares)]
        return [*legs, self._leg()]

    def _leg(self, end: int | None = None) -> Leg:
        """A connection that breaks there, or lasts."""
        draw = self._draw
        reach = self._switch + self._behind if end is None else end + 1
        faults = [self._stall(reach) for _ in range(draw.choice((0, 0, 1, 2)))]
        if end is not None:
            ways = draw.choice((BOTH, BOTH, (Way.FORTH,), (Way.BACK,)))
            faults.append(Fault(draw.choice(ENDS), end, ways=ways, seconds=draw.uniform(0.01, 0.1)))
        pieces, delay = draw.choice(((1 << 12, 0), (1 << 14, 0), (1 << 16, 0), (1 << 16, 0.0002)))
        return Leg(Weather(tuple(faults), pieces, delay, draw.random()))

    def _stall(self, reach: int) -> Fault:
        ways = self._draw.choice((BOTH, (Way.FORTH,), (Way.BACK,)))
        at, seconds = self._draw.randrange(reach), self._draw.uniform(0.001, 0.05)
        return Fault(Kind.STALL, at, ways=ways, seconds=seconds)

    def _troubled(self, leg: Leg) -> Leg:
        """A recovery that does not go well at once."""
        draw = self._draw
        mistakes = tuple(draw.sample(MISTAKES, draw.choice((0, 0, 0, 1, 2))))
        leg = dataclasses.replace(leg, mistakes=mistakes, again=draw.choice((0.0, 0.0, 0.05)))
        *others, last = leg.weather.faults or (None,)
        if last is None or last.kind not in ENDS or draw.random() > 0.25:
            return leg
        if draw.random() < 0.5:
            last = dataclasses.replace(last, at=draw.randrange(self._handshake + 1))
        else:
            at = draw.randrange(self._bitmaps)
            last = dataclasses.replace(last, at=at, counted=Way.BACK)
        return _with_faults(leg, (*others, last))

    def _with_kill(self, leg: Leg, start: int, kill: Kill) -> Leg:
        """On the way to its end, few of them in the long precopy, or while there is none."""
        draw = self._draw
        if start == 0 and draw.random() < 0.25:
            return dataclasses.replace(leg, kills=(*leg.kills, kill))
        ends = [f.at for f in leg.weather.faults if f.kind in ENDS and f.counted is Way.FORTH]
        end = min(ends, default=start + self._behind)
        least = start if start < end and draw.random() < 0.7 else 0
        return _with_faults(
            leg, (Fault(Kind.CALL, draw.randint(least, end), note=kill), *leg.weather.faults)
        )

    def kill_coordinators(self, legs: list[Leg], kills: int) -> list[Leg]:
        """Each takes its connection along, so there is another one behind it; but who is stopped
        goes on where it was."""
        draw = self._draw
        for _ in range(kills):
            number = draw.randrange(len(legs))
            start = self._switch if number == 0 else 0
            kill = self._coordinator_kill()
            legs[number] = self._with_kill(legs[number], start, kill)
            if kill.signal != "STOP":
                legs.insert(number + 1, self._leg())
        return legs

    def _coordinator_kill(self) -> Kill:
        draw = self._draw
        whom, signal = draw.choice((COORDINATOR, EVERYTHING)), draw.choice(COORDINATOR_SIGNALS)
        if signal == "STOP":
            return Kill(COORDINATOR, signal, draw.uniform(0.01, 0.5))
        return Kill(whom, signal)

    def _kill(self) -> Kill:
        draw = self._draw
        signal = draw.choice(SIGNALS)
        stopped = draw.choice((None, draw.uniform(0.001, 0.2))) if signal == "STOP" else None
        whom = draw.choice((*range(self._workers), *range(self._workers), ALL, SPARE))
        return Kill(whom, signal, stopped)


def _with_faults(leg: Leg, faults: tuple[Fault, ...]) -> Leg:
    return dataclasses.replace(leg, weather=dataclasses.replace(leg.weather, faults=faults))


def _bytes(versions: bytes) -> int:
    """On the wire, about."""
    return sum(RECORD_BYTES if version else 9 for version in versions)
