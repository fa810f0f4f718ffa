"""Downtime of a postcopy migration: `sharded-pc run` beside QEMU's own destination, in turns.

    python -m benchmarks.downtime [--repeat 5] [--memory 256] [--json]

Run it from a checkout (it uses the QEMUs, the guest and the fixtures of tests/).  Downtime is the
time from the source's STOP event to the destination's RESUME event, as the two QEMUs stamp them.
The guest walks over all of its memory; precopy is held at 4 MiB/s and the switch comes after 1 MiB,
so nearly all RAM is missing when it resumes.  Postcopy is not limited unless --rate is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.qemu import backports
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import MIB, write_image
from tests.qemu.vm import QemuVm
from tests.runner import Destination, Runner
from tests.test_receive_qemu import begin_precopy, switch
from tests.test_run_qemu import seconds


def migrate(source: QemuVm, guest: QemuVm, uri: str, rate: int) -> float:
    """Milliseconds from STOP to RESUME; returns when the source has completed."""
    begin_precopy(source, uri)
    if isinstance(guest, Destination):
        guest.start()
    switch(source, postcopy_rate=rate)
    stop, start = source.wait_event("STOP"), guest.wait_event("RESUME")
    source.set_parameters(max_postcopy_bandwidth=0)
    source.wait_migration("completed")
    assert guest.wrong_words() == []
    return 1000 * (seconds(start) - seconds(stop))


def ours(folder: Path, source: QemuVm, options: dict, rate: int) -> float:
    guest = Destination(folder, "dst", **options)
    with Runner(folder, f"downtime-{os.getpid()}", guest) as runner:
        took = migrate(source, guest, runner.uri(), rate)
        runner.wait_info()
        guest.qmp("quit")
        runner.finish()
    return took


def qemus(folder: Path, source: QemuVm, options: dict, rate: int) -> float:
    with QemuVm(folder, "dst", incoming="defer", **options) as guest:
        guest.set_capabilities(postcopy_ram=True, events=True)
        uri = f"unix:{folder / 'incoming'}"
        guest.qmp("migrate-incoming", uri=uri)
        return migrate(source, guest, uri, rate)


def once(measure: Callable, binary: QemuBinary, memory_mib: int, rate: int) -> float:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="downtime-")))
        image = write_image(folder / "guest.img", memory_mib, writes=False)
        options = {"binary": binary, "memory_mib": memory_mib, "image": image}
        source = stack.enter_context(QemuVm(folder, "src", **options))
        source.wait_serial("F")
        return measure(folder, source, options, rate)


def results(repeat: int, memory_mib: int, rate: int) -> list[dict]:
    rows = []
    for binary in backports.available_qemus():
        runs: dict[str, list[float]] = {"sharded-pc run": [], "QEMU": []}
        for _ in range(repeat):
            runs["sharded-pc run"].append(once(ours, binary, memory_mib, rate))
            runs["QEMU"].append(once(qemus, binary, memory_mib, rate))
        rows += [
            {
                "qemu": str(binary),
                "destination": name,
                "median": statistics.median(took),
                "runs": took,
            }
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
    print(f"{'qemu':12} {'destination':16} {'median':>7}  least..greatest")
    for row in rows:
        least, greatest = min(row["runs"]), max(row["runs"])
        names = f"{row['qemu']:12} {row['destination']:16}"
        print(f"{names} {row['median']:7.1f}  {least:.1f}..{greatest:.1f}")


if __name__ == "__main__":
    main()
