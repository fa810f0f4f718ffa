"""Downtime and first sweep of a postcopy migration: `sharded-pc run` beside QEMU's own destination,
in turns.

    python -m benchmarks.downtime [--repeat 5] [--memory 256] [--json]

Run it from a checkout (it uses the QEMUs, the guest and the fixtures of tests/).  Downtime is the
time from the source's STOP event to the destination's RESUME event, as the two QEMUs stamp them;
the sweep is the time from RESUME until the guest has gone once over all of its memory there.
The guest walks over all of its memory; precopy is held at 4 MiB/s and the switch comes after 1 MiB,
so nearly all RAM is missing when it resumes.  Postcopy is not limited unless --rate is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.qemu import backports
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import MIB, write_image
from tests.qemu.vm import QemuVm
from tests.runner import Destination, Runner
from tests.test_receive_qemu import begin_precopy, switch
from tests.test_run_qemu import seconds

SWEEP_SECONDS = 60


def sweep_end(guest: QemuVm) -> float:
    """When the guest has ended its second pass here: the first one began at the source."""
    deadline = time.time() + SWEEP_SECONDS
    while guest.serial().count(".") < 2:
        if time.time() > deadline:
            raise TimeoutError(f"no sweep in {SWEEP_SECONDS} s")
        time.sleep(0.001)
    return time.time()


def migrate(source: QemuVm, guest: QemuVm, uri: str, rate: int) -> tuple[float, float]:
    """Milliseconds from STOP to RESUME, and from there to the end of the first sweep; returns when
    the source has completed."""
    begin_precopy(source, uri)
    if isinstance(guest, Destination):
        guest.start()
    switch(source, postcopy_rate=rate)
    stop, start = source.wait_event("STOP"), guest.wait_event("RESUME")
    swept = sweep_end(guest)
    source.set_parameters(max_postcopy_bandwidth=0)
    source.wait_migration("completed")
    assert guest.wrong_words() == []
    return 1000 * (seconds(start) - seconds(stop)), 1000 * (swept - seconds(start))


def ours(placement: str, folder: Path, source: QemuVm, options: dict, rate: int) -> tuple:
    guest = Destination(folder, "dst", **options)
    words = ("--placement", placement)
    with Runner(folder, f"downtime-{os.getpid()}", guest, *words) as runner:
        took = migrate(source, guest, runner.uri(), rate)
        runner.wait_info()
        guest.qmp("quit")
        runner.finish()
    return took


def qemus(folder: Path, source: QemuVm, options: dict, rate: int) -> tuple:
    with QemuVm(folder, "dst", incoming="defer", **options) as guest:
        guest.set_capabilities(postcopy_ram=True, events=True)
        uri = f"unix:{folder / 'incoming'}"
        guest.qmp("migrate-incoming", uri=uri)
        return migrate(source, guest, uri, rate)


def once(measure: Callable, binary: QemuBinary, memory_mib: int, rate: int) -> tuple:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="downtime-")))
        image = write_image(folder / "guest.img", memory_mib, writes=False)
        options = {"binary": binary, "memory_mib": memory_mib, "image": image}
        source = stack.enter_context(QemuVm(folder, "src", **options))
        source.wait_serial("F")
        return measure(folder, source, options, rate)


DESTINATIONS: dict[str, Callable] = {
    "run, copy": partial(ours, "copy"),
    "run, continue": partial(ours, "continue"),
    "QEMU": qemus,
}


def row(qemu: str, figure: str, name: str, took: list[float]) -> dict:
    median = statistics.median(took)
    return {"qemu": qemu, "figure": figure, "destination": name, "median": median, "runs": took}


def results(repeat: int, memory_mib: int, rate: int) -> list[dict]:
    rows = []
    for binary in backports.available_qemus():
        runs: dict[str, list[tuple]] = {name: [] for name in DESTINATIONS}
        for _ in range(repeat):
            for name, measure in DESTINATIONS.items():
                runs[name].append(once(measure, binary, memory_mib, rate))
        for what, figure in enumerate(("downtime", "sweep")):
            rows += [
                row(str(binary), figure, name, [both[what] for both in took])
                for name, took in runs.items()
            ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory", type=int, default=256, metavar="MIB")
    parser.add_argument(
        "--rate", type=int, default=0, metavar="MIB/S", help="in postcopy; 0: no limit"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = results(args.repeat, args.memory, args.rate * MIB)
    if args.json:
        print(json.dumps({"parameters": vars(args), "load": os.getloadavg()[0], "results": rows}))
        return
    print(f"{args.memory} MiB, {args.repeat} repeats in turns, load {os.getloadavg()[0]:.1f}; ms")
    print(f"{'qemu':12} {'figure':9} {'destination':14} {'median':>7}  least..greatest")
    for each in rows:
        least, greatest = min(each["runs"]), max(each["runs"])
        names = f"{each['qemu']:12} {each['figure']:9} {each['destination']:14}"
        print(f"{names} {each['median']:7.1f}  {least:.1f}..{greatest:.1f}")


if __name__ == "__main__":
    main()
