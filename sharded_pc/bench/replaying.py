"""One recording into QEMU's own destination or into the product, once, and what it cost."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NoReturn

from sharded_pc.bench import bare, packets, usage
from sharded_pc.bench.idle_guest import IdleGuest
from sharded_pc.bench.jobs import Channels, Job, Whole
from sharded_pc.bench.peer import QemuPeer, Qmp
from sharded_pc.bench.product import Product
from sharded_pc.bench.recording import Recording
from sharded_pc.bench.sender import NotTaken, Sender, Sent, Where
from sharded_pc.errors import HostError, ShardedPcError
from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.testing.certificates import Authority

GIB = 1 << 30
FIGURES = (
    "ms", "gb-per-second", "gb-per-second-with-zero-pages", "cpu-seconds-per-gib",
    "cpu-seconds-per-gib-with-set-up", "private-mib-beside-ram",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """How the pages travel.  `channels` of multifd, 0: as they were recorded."""

    transport: str
    channels: int = 0
    compression: str = "none"
    tls: bool = False

    WORDS: ClassVar[tuple[str, ...]] = ("transport", "channels", "compression", "tls")

    def told(self) -> dict:
        return dataclasses.asdict(self)


class Replay:
    """One recording into one receiver after the other; a context manager.

    Packets of all `ways` are made first: each combination of channels and compression has a file.
    UsageError, HostError, GuestLost."""

    def __init__(self, found: Recording, ways: Sequence[Way], pause: float) -> None:
        self._recording, self._ways, self._pause = found, ways, pause
        self._names = bare.names()
        self._exit = contextlib.ExitStack()
        self._jobs: dict[tuple[int, str], Job] = {}
        self._pages: dict[tuple[int, str], tuple[int, int]] = {}
        """with data, and zero"""

    def __enter__(self) -> Replay:
        with contextlib.ExitStack() as undo:
            folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="sharded-pc-replay-"))
            self._folder = Path(folder)
            self._make_jobs()
            if any(way.tls for way in self._ways):
                self._make_certificates()
            self._sender = undo.enter_context(Sender())
            self._guest = undo.enter_context(IdleGuest())
            self._exit = undo.pop_all()
        return self

    def _make_jobs(self) -> None:
        found = self._recording
        for count, method in dict.fromkeys((way.channels, way.compression) for way in self._ways):
            job: Job = Whole(found.path, found.setup_end)
            pages = found.normal, found.zero
            if count:
                file = self._folder / f"packets-{count}-{method}"
                made = packets.write(found, file, count, method)
                job, pages = Channels(made), (made.normal, made.zero)
            self._jobs[count, method], self._pages[count, method] = job, pages

    def _make_certificates(self) -> None:
        authority = Authority(self._folder / "authority")
        for what in ("server", "client"):
            authority.issue(self._folder / what, what)

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _address(self, transport: str) -> str:
        return "tcp:127.0.0.1:0" if transport == "tcp" else f"unix:{self._folder / 'stream'}"

    def qemu(self, way: Way) -> dict:
        """The figures of one run into QEMU."""
        found = self._recording.qemu
        assert found is not None
        with QemuPeer(found.command, self._folder, environment=found.environment) as peer:
            uri = self._listen(peer, way)
            try:
                sent = self._send(way, uri, [peer.pid])
            except NotTaken as error:
                _explain(error, lambda: peer.wait("completed", timeout=5))
            memory = peer.memory()
            peer.wait("completed")
        normal, _ = self._pages[way.channels, way.compression]
        return self._figures(way, *sent, memory["private"] - normal * PAGE_BYTES) | {
            "memory": memory
        }

    def _listen(self, peer: QemuPeer, way: Way) -> str:
        if way.tls:
            peer.qmp("object-add", qom_type="tls-creds-x509", id="tls0", endpoint="server",
                     verify_peer=True, dir=str(self._folder / "server"))  # fmt: skip
            peer.qmp("migrate-set-parameters", tls_creds="tls0")
        if not way.channels:
            return peer.listen(self._address(way.transport))
        peer.qmp("migrate-set-capabilities", capabilities=[_on("multifd")])  # parameters want it
        peer.qmp("migrate-set-parameters", multifd_channels=way.channels,
                 multifd_compression=way.compression)  # fmt: skip
        return peer.listen(self._address(way.transport), postcopy=False)

    def product(self, way: Way, workers: int, placement: str) -> dict:
        """The figures of one run into our receiver."""
        name = next(self._names)
        control = str(self._folder / f"{name}.control")
        tls = ("--tls-creds", str(self._folder / "server")) if way.tls else ()
        product = Product(
            self._folder, name, self._address(way.transport), "--control", control, *tls,
            workers=workers, placement=placement,
        )  # fmt: skip
        with product:
            # As long as we may ask it something, it keeps its workers.
            with contextlib.closing(Qmp(control)):
                if not way.channels:
                    self._guest.begin(product.attach_path)
                try:
                    sent = self._send(way, product.uri, product.pids(), self._attached)
                except NotTaken as error:
                    _explain(error, lambda: _failed(product))
                memory = _tree_memory(product.pids())
                if not way.channels:
                    self._guest.wait("released")
            _failed(product)
            info = product.info()
        assert info is not None
        memory["sharded"] = info["sharded"].get("memory")
        return self._figures(way, *sent, memory["private"]) | {"memory": memory}

    def _attached(self, way: Way) -> None:
        """Without a pause the guest comes when it can, while pages stream in."""
        if self._pause and not way.channels:
            self._guest.wait("attached")

    def _send(
        self,
        way: Way,
        uri: str,
        pids: list[int],
        on_pause: Callable[[Way], object] | None = None,
    ) -> tuple[Sent, float]:
        """What was sent, and the CPU seconds that the processes used for the set-up."""
        before, after = usage.tree_cpu_seconds(pids), []

        def paused() -> list[int]:
            if on_pause is not None:
                on_pause(way)
            after.append(usage.tree_cpu_seconds(pids))
            return pids

        where = Where(uri, self._pause, str(self._folder / "client") if way.tls else None)
        sent = self._sender.send(self._jobs[way.channels, way.compression], where, paused)
        return sent, after[0] - before

    def _figures(self, way: Way, sent: Sent, setup: float, private: int) -> dict:
        pages = self._pages[way.channels, way.compression]
        payload, zeros = (count * PAGE_BYTES for count in pages)
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


def _on(capability: str) -> dict:
    return {"capability": capability, "state": True}
