"""How fast a recorded postcopy stream is taken in: the product beside QEMU's own destination.

A sender process stops behind the set-up section, as a real source's precopy leaves time there, then
sends the rest at full speed.  What is measured begins with the next byte and ends with SHUT on the
return path: everything is placed.  The guests do nothing: QEMU's is stopped (-S), the product has
one attached process that has mapped and registered the RAM as a destination QEMU would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from sharded_pc import host
from sharded_pc.bench import bare, recording, report, usage
from sharded_pc.bench.figures import compare, spread
from sharded_pc.bench.idle_guest import IdleGuest
from sharded_pc.bench.peer import QemuPeer, Qmp
from sharded_pc.bench.plot import Panel
from sharded_pc.bench.product import Product
from sharded_pc.bench.recording import RECIPE, Recording
from sharded_pc.bench.report import Column
from sharded_pc.bench.sender import NotTaken, Sender, Sent
from sharded_pc.errors import HostError, ShardedPcError, UsageError
from sharded_pc.geometry import PAGE_BYTES

GIB = 1 << 30
FIGURES = (
    "ms", "gb-per-second", "gb-per-second-with-zero-pages", "cpu-seconds-per-gib",
    "cpu-seconds-per-gib-with-set-up", "private-mib-beside-ram",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class ReplaySettings:
    """One row for each transport, placement and worker count; `pause` is in seconds."""

    recording: str
    peer: str | None = None
    workers: tuple[int, ...] = (1, 2)
    placements: tuple[str, ...] = ("copy", "continue")
    transports: tuple[str, ...] = ("unix", "tcp")
    pause: float = 1.0
    repeat: int = 5


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
    with _Replay(settings, found) as replay:
        runs = replay.all_runs()
    return {"recording": dataclasses.asdict(found), "runs": runs, "results": _results(runs)}


class _Replay:
    """One recording into every receiver, in turns."""

    def __init__(self, settings: ReplaySettings, found: Recording) -> None:
        self._settings, self._recording = settings, found
        self._names = bare.names()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> _Replay:
        with contextlib.ExitStack() as undo:
            folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="sharded-pc-replay-"))
            self._folder = Path(folder)
            self._sender = undo.enter_context(Sender(self._recording.path))
            self._guest = undo.enter_context(IdleGuest())
            self._exit = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def all_runs(self) -> list[dict]:
        """The first round touches all memory and does not count."""
        rounds = [list(self._round(repeat)) for repeat in range(-1, self._settings.repeat)]
        return [row for rows in rounds[1:] for row in rows]

    def _round(self, repeat: int) -> Iterator[dict]:
        for transport in self._settings.transports:
            where = {"repeat": repeat, "transport": transport}
            if self._settings.peer:
                row = {"receiver": "qemu", **where, "workers": None, "placement": None}
                yield row | self.qemu(transport)
            for workers in self._settings.workers:
                for placement in self._settings.placements:
                    row = {"receiver": "product", **where}
                    row |= {"workers": workers, "placement": placement}
                    yield row | self.product(transport, workers, placement)

    def _address(self, transport: str) -> str:
        return "tcp:127.0.0.1:0" if transport == "tcp" else f"unix:{self._folder / 'stream'}"

    def qemu(self, transport: str) -> dict:
        """The figures of one run into QEMU."""
        found = self._recording.qemu
        assert found is not None
        with QemuPeer(found.command, self._folder, environment=found.environment) as peer:
            uri = peer.listen(self._address(transport))
            try:
                sent = self._send(uri, [peer.pid])
            except NotTaken as error:
                _explain(error, lambda: peer.wait("completed", timeout=5))
            memory = peer.memory()
            peer.wait("completed")
        beside = memory["private"] - self._recording.payload
        return self._figures(*sent, beside) | {"memory": memory}

    def product(self, transport: str, workers: int, placement: str) -> dict:
        """The figures of one run into our receiver."""
        name = next(self._names)
        control = str(self._folder / f"{name}.control")
        product = Product(
            self._folder, name, self._address(transport), "--control", control,
            workers=workers, placement=placement,
        )  # fmt: skip
        with product:
            # As long as we may ask it something, it keeps its workers.
            with contextlib.closing(Qmp(control)):
                self._guest.begin(product.attach_path)
                try:
                    sent = self._send(product.uri, product.pids(), self._attached)
                except NotTaken as error:
                    _explain(error, lambda: _failed(product))
                memory = _tree_memory(product.pids())
                self._guest.wait("released")
            _failed(product)
            info = product.info()
        assert info is not None
        memory["sharded"] = info["sharded"].get("memory")
        return self._figures(*sent, memory["private"]) | {"memory": memory}

    def _attached(self) -> None:
        """Without a pause the guest comes when it can, while pages stream in."""
        if self._settings.pause:
            self._guest.wait("attached")

    def _send(
        self, uri: str, pids: list[int], on_pause: Callable[[], object] = lambda: None
    ) -> tuple[Sent, float]:
        """What was sent, and the CPU seconds that the processes used for the set-up."""
        before, after = usage.tree_cpu_seconds(pids), []

        def paused() -> list[int]:
            on_pause()
            after.append(usage.tree_cpu_seconds(pids))
            return pids

        sent = self._sender.send(uri, self._recording.setup_end, self._settings.pause, paused)
        return sent, after[0] - before

    def _figures(self, sent: Sent, setup: float, private: int) -> dict:
        payload, zeros = self._recording.payload, self._recording.zero * PAGE_BYTES
        return {
            "ns": sent.ns,
            "sent-ns": sent.sent_ns,
            "cpu-seconds": sent.cpu_seconds,
            "postcopy-requests": sent.requests,
            "ms": sent.ns / 1e6,
            "gb-per-second": payload / sent.ns,
            "gb-per-second-with-zero-pages": (payload + zeros) / sent.ns,
            "cpu-seconds-per-gib": sent.cpu_seconds * GIB / payload,
            "cpu-seconds-per-gib-with-set-up": (sent.cpu_seconds + setup) * GIB / payload,
            "private-mib-beside-ram": private / (1 << 20),
        }


def _explain(error: NotTaken, look: Callable[[], object]) -> NoReturn:
    """Raises what the receiver says of its failure, if it says something."""
    try:
        look()
    except ShardedPcError as better:
        raise better from error
    raise error


def _failed(product: Product) -> None:
    """Waits for the product's end; raises its last words unless all went well."""
    ending = product.finish()
    if ending.exit_code:
        raise HostError(f"the receiver ended with {ending.exit_code}: {product.last_words()}")


def _tree_memory(pids: list[int]) -> dict:
    """Sums over processes; `peak` counts shared pages once for each process that maps them."""
    each = [usage.memory(pid) for pid in pids]
    sums = {key: sum(memory[key] for memory in each) for key in ("peak", "private")}
    return {**sums, "processes": len(each)}


# --- what is told ---


def _results(runs: list[dict]) -> list[dict]:
    """One row for each transport, placement and worker count, over all repeats."""
    mine = [run for run in runs if run["receiver"] == "product"]
    keys = dict.fromkeys((run["transport"], run["workers"], run["placement"]) for run in mine)
    return [_result(runs, *key) for key in keys]


def _result(runs: list[dict], transport: str, workers: int, placement: str) -> dict:
    def of(receiver: str, *key: object) -> list[dict]:
        found = [
            run for run in runs if (run["receiver"], run["transport"]) == (receiver, transport)
        ]
        return [run for run in found if not key or (run["workers"], run["placement"]) == key]

    product, qemu = of("product", workers, placement), of("qemu")
    row = {"transport": transport, "workers": workers, "placement": placement}
    return row | {
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
        title, "workers", "workers", figure, axis, ("transport", "placement"),
        reference="qemu", reference_labels=("transport",),
    )
    for title, figure, axis in (
        ("Throughput of pages with data", "gb-per-second", "GB/s"),
        ("CPU time", "cpu-seconds-per-gib", "CPU s/GiB"),
    )
)  # fmt: skip


def text(told: dict) -> str:
    """The table, below what was replayed and how."""
    parameters, found = told["parameters"], told["recording"]
    columns = [c for c in COLUMNS if parameters["peer"] or c.form not in ("qemu", "ratio")]
    placed = found["normal"] * PAGE_BYTES >> 20
    head = [
        f"bench replay: {placed} MiB in {found['normal']} pages with data, {found['zero']} zero "
        f"pages; {parameters['repeat']} repeats, all receivers in turns; medians (least..greatest)",
        f"from {parameters['pause']:g} s after the set-up section to SHUT; GB/s: of pages with "
        f"data; set-up: CPU time until then; MiB: private memory beside the guest's RAM",
    ]
    _, *rest = report.text({**told, "parameters": {**parameters, "size": 0}}, columns).splitlines()
    return "\n".join([*head, *rest])
