"""What a guest feels of the switch: `sharded-pc run` beside QEMU's own destination, in turns.

    python -m benchmarks.downtime [--repeat 5] [--switch 0.3,3] [--machine pc,q35] [--json]

Run it from a checkout (it uses the QEMUs and the fixtures of tests/; the kernel is fetched once).
A Linux guest under TCG writes most of its memory in a loop (linux_guest.py).  Precopy is limited to
400 MiB/s, postcopy is not; the switch is told so many seconds after the migration began.

========  ==========================================================================================
downtime  from the source's STOP event to the destination's RESUME event, as both QEMUs stamp them
total     from the word for the switch to the source's `completed`
sweep     the longest of the guest's first three passes that it ends there, by its own clock
========  ==========================================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks import linux_guest
from tests.qemu import backports
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import MIB
from tests.qemu.vm import QemuVm
from tests.runner import Destination, Runner
from tests.test_run_qemu import seconds

SECONDS = 120
PRECOPY_RATE = 400 * MIB
PASSES = 3
FIGURES = ("downtime", "total", "sweep")
Measure = Callable[[Path, QemuVm, dict], "Sample"]
Sample = tuple[float, float, float]


@contextmanager
def ours(placement: str, folder: Path, options: dict) -> Iterator[tuple[QemuVm, str]]:
    guest = Destination(folder, "dst", **options)
    words = ("--placement", placement)
    with Runner(folder, f"downtime-{os.getpid()}", guest, *words) as runner:
        yield guest, runner.uri()
        runner.wait_info()
        guest.qmp("quit")
        runner.finish()


@contextmanager
def qemus(folder: Path, options: dict) -> Iterator[tuple[QemuVm, str]]:
    with QemuVm(folder, "dst", incoming="defer", **options) as guest:
        guest.set_capabilities(postcopy_ram=True, events=True)
        uri = f"unix:{folder / 'incoming'}"
        guest.qmp("migrate-incoming", uri=uri)
        yield guest, uri


DESTINATIONS: dict[str, Callable] = {
    "run, copy": partial(ours, "copy"),
    "run, continue": partial(ours, "continue"),
    "QEMU": qemus,
}


def migrate(source: QemuVm, guest: QemuVm, uri: str, switch_after: float) -> Sample:
    source.set_capabilities(postcopy_ram=True, events=True)
    source.set_parameters(max_bandwidth=PRECOPY_RATE, downtime_limit=1, max_postcopy_bandwidth=0)
    source.migrate(uri)
    began = time.monotonic()
    if isinstance(guest, Destination):
        guest.start()
    time.sleep(max(0, began + switch_after - time.monotonic()))
    told = time.time()
    source.start_postcopy()
    stop = seconds(source.wait_event("STOP"))
    resume = seconds(guest.wait_event("RESUME"))
    source.wait_migration("completed", timeout=SECONDS)
    completed = time.time()
    return 1000 * (resume - stop), 1000 * (completed - told), _worst_sweep(guest)


def _worst_sweep(guest: QemuVm) -> float:
    """The first pass that it ends there began at the source, and counts: it met the switch."""

    def swept() -> list[float] | None:
        took = [milliseconds for _, milliseconds in linux_guest.passes(guest.serial())]
        return took[:PASSES] if len(took) >= PASSES else None

    took = guest.wait_until(swept, f"{PASSES} passes", SECONDS)
    assert "wrong" not in guest.serial(), guest.error("the guest found wrong pages")
    return max(took)


def once(destination: Callable, state: Path, options: dict, switch_after: float) -> Sample:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="downtime-")))
        source = QemuVm(folder, "src", incoming=f"exec:cat {state}", **options)
        stack.enter_context(source)
        source.wait_until(lambda: source.run_state() in ("paused", "running"), "its state")
        guest, uri = stack.enter_context(destination(folder, options))
        source.qmp("cont")
        source.wait_until(lambda: linux_guest.passes(source.serial()), "a pass", SECONDS)
        return migrate(source, guest, uri, switch_after)


def measured(args: argparse.Namespace, binary: QemuBinary, machine: str) -> Iterator[dict]:
    with tempfile.TemporaryDirectory(prefix="downtime-state-") as at:
        extra = linux_guest.arguments(Path(at), args.memory * 2 // 3)
        extra += ["-vga", "std"] if args.vga else []
        state = linux_guest.boot(Path(at), binary, args.memory, extra, machine)
        options = {"binary": binary, "memory_mib": args.memory, "extra": extra, "machine": machine}
        for _ in range(args.repeat):
            for switch_after in args.switch:
                for name, destination in DESTINATIONS.items():
                    sample = once(destination, state, options, switch_after)
                    for figure, took in zip(FIGURES, sample, strict=True):
                        yield {
                            "qemu": str(binary), "machine": machine, "switch": switch_after,
                            "destination": name, "figure": figure, "ms": took,
                        }  # fmt: skip


KEYS = ("qemu", "machine", "switch", "figure")


def table(runs: list[dict]) -> Iterator[str]:
    """Medians; the ratio is that of the medians, QEMU's own destination is 1."""
    columns = "".join(f"  {name:>26}" for name in DESTINATIONS)
    yield f"{'source':12} {'machine':8} {'switch':>6} {'ms':9}{columns}"
    for key in dict.fromkeys(tuple(run[k] for k in KEYS) for run in runs):
        took = {
            name: [r["ms"] for r in runs
                   if tuple(r[k] for k in KEYS) == key and r["destination"] == name]
            for name in DESTINATIONS
        }  # fmt: skip
        peer = statistics.median(took["QEMU"])
        cells = ""
        for each in took.values():
            median = statistics.median(each)
            cell = f"{median:.1f} ({min(each):.1f}..{max(each):.1f})"
            cells += f"  {cell:>20} {median / peer:5.2f}"
        yield f"{key[0]:12} {key[1]:8} {key[2]:>5}s {key[3]:9}{cells}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--memory", type=int, default=768, metavar="MIB", help="two thirds are written"
    )
    parser.add_argument("--switch", type=_numbers, default=(0.3, 3.0), metavar="SECONDS,...")
    parser.add_argument("--machine", type=lambda text: text.split(","), default=["pc"])
    parser.add_argument("--vga", action="store_true", help="with video memory of its own")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load, runs = os.getloadavg()[0], []
    for binary in backports.available_qemus():
        if binary.version < backports.NEWER:
            continue  # as a source it loses pages of a guest that writes
        for machine in args.machine:
            runs += measured(args, binary, machine)
    if args.json:
        print(json.dumps({"parameters": vars(args), "load": load, "runs": runs}))
        return
    print(f"{args.memory} MiB, Linux that writes, {args.repeat} repeats in turns, load {load:.1f}")
    print("median (least..greatest), and its ratio to QEMU's own destination")
    print(*table(runs), sep="\n")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


if __name__ == "__main__":
    main()
