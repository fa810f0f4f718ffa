"""How fast a recorded stream is taken in: the product beside QEMU's own destination.

A sender process stops behind the set-up section, as a real source's precopy leaves time there, then
sends the rest at full speed.  What is measured begins with the next byte and ends when everything
is placed.

As it was recorded, by postcopy: SHUT on the return path says so.  The guests do nothing: QEMU's is
stopped (-S), the product has one attached process that has mapped and registered the RAM as a
destination QEMU would.  With `channels` the recording's pages go over channels of multifd, in
precopy (packets.py): the PONG of a PING behind all of them says so, and no guest is there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from sharded_pc import host
from sharded_pc.bench import recording, report
from sharded_pc.bench.figures import compare, spread
from sharded_pc.bench.plot import Panel
from sharded_pc.bench.recording import RECIPE
from sharded_pc.bench.replaying import FIGURES, Replay, Way
from sharded_pc.bench.report import Column
from sharded_pc.errors import UsageError
from sharded_pc.geometry import PAGE_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class ReplaySettings:
    """One row for each way, placement and worker count; `pause` is in seconds.  `channels`: over
    so many of multifd, (): as it was recorded; `tls`: inside TLS as well as plain."""

    recording: str
    peer: str | None = None
    workers: tuple[int, ...] = (1, 2)
    placements: tuple[str, ...] = ("copy", "continue")
    transports: tuple[str, ...] = ("unix", "tcp")
    pause: float = 1.0
    repeat: int = 5
    channels: tuple[int, ...] = ()
    compressions: tuple[str, ...] = ("none",)
    tls: bool = False

    def ways(self) -> Iterator[Way]:
        channels = [(0, "none")]
        if self.channels:
            channels = list(itertools.product(self.channels, self.compressions))
        secrecy = (False, True) if self.tls else (False,)
        for transport, (count, method), tls in itertools.product(
            self.transports, channels, secrecy
        ):
            yield Way(transport, count, method, tls)


def run(settings: ReplaySettings) -> dict:
    """{"recording": {...}, "runs": [...], "results": [...]}; UsageError, HostError, GuestLost,
    RemoteProtocolError for a bad recording."""
    found = recording.read(settings.recording)
    if settings.peer and found.qemu is None:
        raise UsageError(
            f"--peer qemu: {recording.sidecar(found.path)} is not there, which says how that QEMU "
            f"is started; make a recording with `{RECIPE}`"
        )
    host.require_host()
    host.require_memory(2 * found.ram)
    with Replay(found, list(settings.ways()), settings.pause) as replay:
        # The first round touches all memory and does not count.
        rounds = [list(_round(settings, replay, repeat)) for repeat in range(-1, settings.repeat)]
    runs = [row for rows in rounds[1:] for row in rows]
    return {"recording": dataclasses.asdict(found), "runs": runs, "results": _results(runs)}


def _round(settings: ReplaySettings, replay: Replay, repeat: int) -> Iterator[dict]:
    """Every receiver once, in turns."""
    for way in settings.ways():
        where = {"repeat": repeat, **way.told()}
        if settings.peer:
            row = {"receiver": "qemu", **where, "workers": None, "placement": None}
            yield row | replay.qemu(way)
        for workers in settings.workers:
            for placement in settings.placements:
                row = {"receiver": "product", **where, "workers": workers, "placement": placement}
                yield row | replay.product(way, workers, placement)


# --- what is told ---


def _results(runs: list[dict]) -> list[dict]:
    """One row for each way, placement and worker count, over all repeats."""
    mine = [run for run in runs if run["receiver"] == "product"]
    keys = dict.fromkeys(tuple(run[word] for word in KEY) for run in mine)
    return [_result(runs, dict(zip(KEY, key, strict=True))) for key in keys]


KEY = (*Way.WORDS, "workers", "placement")


def _result(runs: list[dict], key: dict) -> dict:
    def of(receiver: str, words: Sequence[str]) -> list[dict]:
        wanted = {"receiver": receiver, **{word: key[word] for word in words}}
        return [run for run in runs if wanted.items() <= run.items()]

    product, qemu = of("product", KEY), of("qemu", Way.WORDS)
    return key | {
        figure: _beside([run[figure] for run in product], [run[figure] for run in qemu])
        for figure in FIGURES
    }


def _beside(product: list[float], qemu: list[float]) -> dict:
    """{"product": spread} and, with a peer, "qemu" and "ratio" as figures.compare has them."""
    if not qemu:
        return {"product": spread(product)}
    found = compare(product, qemu)
    return {"product": found["product"], "qemu": found["floor"], "ratio": found["ratio"]}


COLUMNS = (
    Column("transport", "transport"),
    Column("channels", "channels"),
    Column("compression", "compression"),
    Column("TLS", "tls"),
    Column("workers", "workers"),
    Column("placement", "placement"),
    Column("product GB/s", "gb-per-second", "product"),
    Column("QEMU GB/s", "gb-per-second", "qemu"),
    Column("GB/s ratio", "gb-per-second", "ratio"),
    Column("product CPU s/GiB", "cpu-seconds-per-gib", "product"),
    Column("QEMU CPU s/GiB", "cpu-seconds-per-gib", "qemu"),
    Column("CPU ratio", "cpu-seconds-per-gib", "ratio"),
    Column("with set-up", "cpu-seconds-per-gib-with-set-up", "product"),
    Column("ratio", "cpu-seconds-per-gib-with-set-up", "ratio"),
    Column("product MiB", "private-mib-beside-ram", "product", digits=0),
)

PLOT = tuple(
    Panel(
        title, "workers", "workers", figure, axis, (*Way.WORDS, "placement"),
        reference="qemu", reference_labels=Way.WORDS,
    )
    for title, figure, axis in (
        ("Throughput of pages with data", "gb-per-second", "GB/s"),
        ("CPU time", "cpu-seconds-per-gib", "CPU s/GiB"),
    )
)  # fmt: skip


def text(told: dict) -> str:
    """The table, below what was replayed and how."""
    parameters, found = told["parameters"], told["recording"]
    channels, peer = parameters["channels"], parameters["peer"]
    shown = {"channels": channels, "compression": channels, "tls": parameters["tls"]}
    shown |= {"qemu": peer, "ratio": peer}
    columns = [c for c in COLUMNS if shown.get(c.key, True) and shown.get(c.form, True)]
    placed = found["normal"] * PAGE_BYTES >> 20
    head = [
        f"bench replay: {placed} MiB in {found['normal']} pages with data, {found['zero']} zero "
        f"pages; {parameters['repeat']} repeats, all receivers in turns; medians (least..greatest)",
        f"from {parameters['pause']:g} s after the set-up section to {_end(parameters)}; GB/s: of "
        f"pages with data; set-up: CPU time until then; MiB: private memory beside the guest's RAM",
    ]
    _, *rest = report.text({**told, "parameters": {**parameters, "size": 0}}, columns).splitlines()
    return "\n".join([*head, *rest])


def _end(parameters: dict) -> str:
    if not parameters["channels"]:
        return "SHUT"
    return "the PONG behind all pages, in precopy over multifd"
