"""From starting the receiver to its listening.

python -m benchmarks.listening [--workers 4] [--repeat 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def once(folder: Path, workers: int) -> float:
    """Seconds until the status descriptor says that a source may connect."""
    reading, writing = os.pipe()
    paths = [f"unix:{folder / 'migration'}", "--attach", str(folder / "attach")]
    options = ["--workers", str(workers), "--status-fd", str(writing), "--no-progress"]
    start = time.monotonic()
    receiver = subprocess.Popen(
        [sys.executable, "-m", "sharded_pc", "receive", *paths, *options],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        if not os.read(reading, 1):
            raise SystemExit("the receiver did not start")
        return time.monotonic() - start
    finally:
        os.close(reading)
        receiver.terminate()
        receiver.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sharded-pc-listening-") as folder:
        took = [once(Path(folder), args.workers) for _ in range(args.repeat)]
    least, greatest = min(took), max(took)
    median = statistics.median(took)
    print(
        f"{args.workers} workers, {args.repeat} times: {median:.3f} s ({least:.3f}..{greatest:.3f})"
    )


if __name__ == "__main__":
    main()
