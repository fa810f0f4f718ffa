"""Demand paging beside QEMU's own destination: the same guest, the same source, in turns.

The guest (fault_image.py) was saved while it waits for a flag.  The source (fault_source.py) sends
the flag, switches to postcopy, and from then on only answers requests for pages, at once.  The
guest reads all its pages, and times each first read with RDTSC, which under TCG is the host's.
`qemu`: QEMU places the pages itself, in private memory.  `product`: `sharded-pc run` resumes a
stock QEMU on our shared memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sharded_pc import host
from sharded_pc.bench import bare, fault_image, fault_state, report
from sharded_pc.bench.fault_image import MIB
from sharded_pc.bench.fault_source import Served, Source
from sharded_pc.bench.fault_state import wait_for_console
from sharded_pc.bench.figures import PERCENTILES, compare, latencies_us
from sharded_pc.bench.peer import QemuPeer
from sharded_pc.bench.product import Product
from sharded_pc.bench.report import Column
from sharded_pc.errors import GuestLost, HostError, UsageError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.native.floor import WrongByte
from sharded_pc.native.ram import WireClosed

QEMU = "qemu-system-x86_64"
MOST_BYTES = 1 << 30
LEAST_RAM = 128 * MIB
FIGURES = (*(f"p{p:g}-us" for p in PERCENTILES), "faults-per-second")


@dataclasses.dataclass(frozen=True, slots=True)
class PeerFaultSettings:
    """`size`: bytes that the guest touches; one row for each placement and worker count."""

    size: int = 128 << 20
    workers: tuple[int, ...] = (1, 2)
    placements: tuple[str, ...] = ("copy", "continue")
    repeat: int = 5
    peer: str = "qemu"

    @property
    def ram(self) -> int:
        """Bytes; what the BIOS keeps at the end must not be touched."""
        return max(LEAST_RAM, 2 * self.size)


def run(settings: PeerFaultSettings) -> dict:
    """{"guest": {...}, "runs": [...], "results": [...]}; UsageError, HostError, GuestLost,
    WrongByte."""
    if settings.size & (settings.size - 1) or settings.size > MOST_BYTES:
        raise UsageError("--size: with --peer a power of two of at most 1G")
    if shutil.which(QEMU) is None:
        raise HostError(f"--peer qemu: there is no {QEMU} on the PATH")
    host.require_host()
    host.require_memory(2 * settings.ram)
    with _FaultPeer(settings) as bench:
        runs = bench.all_runs()
        guest = {"machine": bench.state.machine, "ticks-per-us": bench.state.ticks_per_us}
    return {"guest": guest, "runs": runs, "results": _results(settings, runs)}


class _FaultPeer:
    """One saved guest, resumed again and again."""

    state: fault_state.State

    def __init__(self, settings: PeerFaultSettings) -> None:
        self._settings = settings
        self._names = bare.names()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> _FaultPeer:
        place = tempfile.TemporaryDirectory(prefix="sharded-pc-fault-")
        self._folder = Path(self._exit.enter_context(place))
        try:
            self._set_up()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _set_up(self) -> None:
        settings, self._console = self._settings, self._folder / "console"
        image = fault_image.write_image(self._folder / "guest.img", settings.size)
        self._command = fault_image.arguments(QEMU, settings.ram, image, self._console)
        self.state = fault_state.save(self._folder, next(self._names), self._command, self._console)

    def all_runs(self) -> list[dict]:
        """A first pair touches all memory and does not count."""
        settings = self._settings
        self._pair(-1, settings.placements[0], settings.workers[0])
        rows = []
        for repeat in range(settings.repeat):
            for placement in settings.placements:
                for workers in settings.workers:
                    rows += self._pair(repeat, placement, workers)
        return rows

    def _pair(self, repeat: int, placement: str, workers: int) -> list[dict]:
        row = {"repeat": repeat, "placement": placement, "workers": workers}
        return [
            {"receiver": "qemu", **row, **self._qemu()},
            {"receiver": "product", **row, **self._product(placement, workers)},
        ]

    def _qemu(self) -> dict:
        self._console.unlink(missing_ok=True)
        with QemuPeer(self._command, self._folder, stopped=False) as peer:
            uri = peer.listen(f"unix:{self._folder / 'stream'}")
            served = self._serve(uri, peer.cpu_seconds)
            peer.wait("completed")
            return self._figures(served, peer)

    def _product(self, placement: str, workers: int) -> dict:
        self._console.unlink(missing_ok=True)
        product = Product(
            self._folder, next(self._names), f"unix:{self._folder / 'stream'}",
            workers=workers, placement=placement, qemu=self._command,
        )  # fmt: skip

        def check() -> None:
            if not product.alive():
                raise GuestLost(f"the receiver ended: {product.last_words()}")

        with product:
            return self._figures(self._serve(product.uri, check), product)

    def _serve(self, uri: str, check: Callable[[], object]) -> Served:
        with _connected(uri) as sock:
            try:
                return Source(sock, self.state, self._settings.size).serve(check)
            except (GuestLost, WireClosed):
                check()  # the receiver knows better why
                raise

    def _figures(self, served: Served, peer: QemuPeer | Product) -> dict:
        pages, rate = self._settings.size // PAGE_BYTES, self.state.ticks_per_us
        told = wait_for_console(self._console, fault_image.length_of(pages), peer)
        found = fault_image.parse(told)
        if found.wrong:
            raise WrongByte(f"the guest read {found.wrong} wrong words of {2 * pages}")
        nanoseconds = [int(ticks * 1000 / rate) for ticks in found.latencies]
        seconds = found.ticks / rate / 1e6
        return {
            "seconds": seconds,
            "wrong-words": found.wrong,
            "requests": served.requests,
            "faults-per-second": pages / seconds,
            **latencies_us(nanoseconds),
        }


@contextlib.contextmanager
def _connected(uri: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(uri.removeprefix("unix:"))
        except OSError as error:
            raise GuestLost(f"connect to {uri}: {error.strerror}") from error
        yield sock


def _results(settings: PeerFaultSettings, runs: list[dict]) -> list[dict]:
    """One row for each placement and worker count, over all repeats."""
    keys = [(p, w) for p in settings.placements for w in settings.workers]
    return [_result(runs, *key) for key in keys]


def _result(runs: list[dict], placement: str, workers: int) -> dict:
    mine = [r for r in runs if (r["placement"], r["workers"]) == (placement, workers)]

    def found(figure: str) -> dict:
        product, qemu = (
            [r[figure] for r in mine if r["receiver"] == who] for who in ("product", "qemu")
        )
        both = compare(product, qemu)
        return {"product": both["product"], "qemu": both["floor"], "ratio": both["ratio"]}

    return {"placement": placement, "workers": workers} | {f: found(f) for f in FIGURES}


COLUMNS = (
    Column("placement", "placement"),
    Column("workers", "workers"),
    *(
        column
        for p in PERCENTILES
        for column in (
            Column(f"p{p:g} us", f"p{p:g}-us", "both", digits=1),
            Column("ratio", f"p{p:g}-us", "ratio"),
        )
    ),
    Column("faults/s", "faults-per-second", "both", digits=0),
    Column("ratio", "faults-per-second", "ratio"),
)
"""Two numbers are product / QEMU."""


def text(told: dict) -> str:
    """The table, below what was done."""
    parameters = told["parameters"]
    head = [
        f"bench fault --peer qemu: a guest under TCG reads {parameters['size'] // PAGE_BYTES} "
        "missing pages once, in a jumping order;",
        f"{parameters['repeat']} repeats, product and QEMU in turns; product / QEMU, "
        "medians (least..greatest)",
    ]
    rows = [_for_table(row) for row in told["results"]]
    _, *rest = report.text({**told, "results": rows}, COLUMNS).splitlines()
    return "\n".join([*head, *rest])


def _for_table(row: dict) -> dict:
    """Columns call what a figure is compared with its floor."""
    figures = {figure: row[figure] | {"floor": row[figure]["qemu"]} for figure in FIGURES}
    return row | figures
