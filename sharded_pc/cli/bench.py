"""`sharded-pc bench`: one small class for each measurement, beside its floor in the same run."""

from __future__ import annotations

import argparse
import json
import signal

from sharded_pc.errors import ExitCode, UsageError

MAX_BATCH = 64
MAX_THREADS = 64
MAX_WORKERS = 64
MAX_CHANNELS = 255
"""`multifd-channels` is a byte."""
COMPRESSIONS = ("none", "zlib", "zstd")
MAX_PAUSE_SECONDS = 60.0
STRIPE_BYTES = 2 << 20


def _size(text: str) -> int:
    """'512M', '2G' or a number of MiB, as QEMU's -m; bytes."""
    scale = {"M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    digits = text[:-1] if scale else text
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 256M or 2G")
    return int(digits) * (scale or 1 << 20)


def _number(text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1 to {most}")
    return int(text)


def _numbers(most: int):
    """A type for '1,2,4'."""
    return lambda text: tuple(_number(part, most) for part in text.split(","))


def _add_common(parser: argparse.ArgumentParser, size: str) -> None:
    parser.add_argument("--size", type=_size, default=size, help=f"of the RAM (default {size})")
    _add_repeats(parser)


def _add_repeats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_numbers(MAX_WORKERS), default=(1, 2), metavar="N,...", help="default 1,2"
    )
    parser.add_argument(
        "--repeat", type=lambda text: _number(text, 1000), default=5, metavar="N", help="default 5"
    )
    parser.add_argument("--json", action="store_true", help="one object, every repeat included")
    parser.add_argument(
        "--plot", metavar="FILE", help="a picture as well, .png or .svg (needs matplotlib)"
    )


def _add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--placement", type=_words("copy", "continue"), default=("copy", "continue"),
        metavar="HOW,...", help="default copy,continue",
    )  # fmt: skip


class Place:
    """Placement cost."""

    name = "place"
    help = "cost of placing a page, by batch size and worker count"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_common(parser, "256M")
        parser.add_argument(
            "--batch", type=_numbers(MAX_BATCH), default=(1, 4, 16, 64), metavar="PAGES,...",
            help="pages for each descriptor and ioctl (default 1,4,16,64)",
        )  # fmt: skip

    def run(self, args: argparse.Namespace) -> int:
        from sharded_pc.bench import place

        settings = place.PlaceSettings(args.size, args.workers, args.batch, args.repeat)
        return _tell(args, place, settings)


class Scale:
    """Pages per second by workers and guest threads."""

    name = "scale"
    help = "rate of demand paging by workers and guest threads, beside a single userfaultfd"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_common(parser, "256M")
        parser.add_argument(
            "--threads", type=_numbers(MAX_THREADS), default=(1, 2, 4, 8), metavar="N,...",
            help="of the guest (default 1,2,4,8)",
        )  # fmt: skip
        parser.add_argument("--page-size", default="4K", metavar="SIZE", help="only 4K")
        _add_placement(parser)

    def run(self, args: argparse.Namespace) -> int:
        from sharded_pc.bench import scale

        page_size = scale.check_page_size(args.page_size)
        settings = scale.ScaleSettings(
            args.size, args.workers, args.threads, page_size, args.placement, args.repeat
        )
        return _tell(args, scale, settings, scale.text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_PAUSE_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected seconds from 0 to {MAX_PAUSE_SECONDS:g}"
        )
    return seconds


def _words(*known: str):
    """A type for 'unix,tcp'."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if len(set(found)) != len(found) or not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(known)}")
        return found

    return parse


class Fault:
    """Fault latency and rate."""

    name = "fault"
    help = "time from a guest's fault to its resumption, by workers and guest threads"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_common(parser, "128M")
        parser.add_argument(
            "--threads", type=_numbers(MAX_THREADS), metavar="N,...",
            help="of the guest (default 1,2)",
        )  # fmt: skip
        parser.add_argument(
            "--peer", choices=["qemu"],
            help="a real guest on demand paging alone, beside QEMU's own destination",
        )  # fmt: skip
        _add_placement(parser)

    def run(self, args: argparse.Namespace) -> int:
        if args.peer:
            return self._beside(args)
        from sharded_pc.bench import fault

        threads = args.threads or (1, 2)
        settings = fault.FaultSettings(
            args.size, args.workers, threads, args.placement, args.repeat
        )
        return _tell(args, fault, settings)

    def _beside(self, args: argparse.Namespace) -> int:
        if args.threads:
            raise UsageError("--threads: with --peer the guest has one processor")
        from sharded_pc.bench import fault_peer

        settings = fault_peer.PeerFaultSettings(
            args.size, args.workers, args.placement, args.repeat
        )
        return _tell(args, fault_peer, settings, fault_peer.text)


class Replay:
    """A recorded stream at full speed."""

    name = "replay"
    help = "throughput of a recorded postcopy stream, beside QEMU's own destination"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "recording", metavar="RECORDING",
            help="from `receive --record FILE`; `python -m benchmarks.record` makes one",
        )  # fmt: skip
        parser.add_argument(
            "--peer", choices=["qemu"], help="compare with it; its arguments are in RECORDING.json"
        )
        _add_placement(parser)
        parser.add_argument(
            "--transport", type=_words("unix", "tcp"), default=("unix", "tcp"), metavar="HOW,...",
            help="default unix,tcp",
        )  # fmt: skip
        parser.add_argument(
            "--pause", type=_seconds, default=1.0, metavar="SECONDS",
            help="the sender's rest after the set-up section, as precopy leaves time (default 1)",
        )  # fmt: skip
        parser.add_argument(
            "--channels", type=_numbers(MAX_CHANNELS), default=(), metavar="N,...",
            help="its pages by precopy, over so many channels of multifd",
        )  # fmt: skip
        parser.add_argument(
            "--compression", type=_words(*COMPRESSIONS), metavar="HOW,...",
            help=f"of multifd: {', '.join(COMPRESSIONS)} (default none)",
        )  # fmt: skip
        parser.add_argument(
            "--tls", action="store_true", help="inside TLS with certificates, too, beside plain"
        )
        _add_repeats(parser)

    def run(self, args: argparse.Namespace) -> int:
        if args.compression and not args.channels:
            raise UsageError("--compression: it is multifd's: give --channels N,... too")
        from sharded_pc.bench import replay

        settings = replay.ReplaySettings(
            args.recording, args.peer, args.workers, args.placement, args.transport, args.pause,
            args.repeat, args.channels, args.compression or ("none",), args.tls,
        )  # fmt: skip
        return _tell(args, replay, settings, replay.text)


class Stall:
    """The longest wait of a guest while something is lost."""

    name = "stall"
    help = "how long a guest stalls when a worker, the wire or all is lost, beside no loss"
    cases = ("worker-killed", "worker-stopped", "workers-killed", "wire-cut", "receiver-killed")

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_common(parser, "512M")
        _add_placement(parser)
        parser.add_argument(
            "--case", type=_words(*self.cases), default=self.cases, metavar="WHAT,...",
            help=f"what is lost (default {','.join(self.cases)})",
        )  # fmt: skip
        parser.set_defaults(workers=(2,), repeat=20)

    def run(self, args: argparse.Namespace) -> int:
        from sharded_pc.bench import stall

        settings = stall.StallSettings(
            args.size, args.workers, args.placement, args.repeat, args.case
        )
        return _tell(args, stall, settings, stall.text)


def _tell(args: argparse.Namespace, bench, settings, text=None) -> int:
    """Measures and prints; SIGTERM ends it in order as ^C does.  `text(told)` makes the table,
    by default report.text with the bench's COLUMNS."""
    from sharded_pc.bench import plot
    from sharded_pc.bench import report as form

    panels = getattr(bench, "PLOT", ())
    if args.plot:
        plot.check(args.plot, panels)
    signals, told = _Signals(), form.report(args.bench, settings)
    try:
        told |= bench.run(settings)
    except KeyboardInterrupt:
        return 128 + signals.number
    if args.json:
        print(json.dumps(told), flush=True)
    else:
        print(text(told) if text else form.text(told, bench.COLUMNS), flush=True)
    if args.plot:  # last: what was measured is told even if the picture cannot be written
        plot.write(args.plot, told, panels)
    return int(ExitCode.COMPLETED)


class _Signals:
    """SIGTERM becomes a ^C, and the exit code tells them apart."""

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, *_: object) -> None:
        self.number = int(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


BENCHES = (Place, Fault, Replay, Scale, Stall)


class Bench:
    """Measurements on this machine."""

    name = "bench"
    help = "measure placement, faults, stalls and whole streams beside what there is to compare"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        words = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
        for bench in (make() for make in BENCHES):
            sub = words.add_parser(bench.name, help=bench.help, description=bench.help)
            bench.add_arguments(sub)
            sub.set_defaults(run_bench=bench.run)

    def run(self, args: argparse.Namespace) -> int:
        if "size" in args and args.size < max(args.workers) * STRIPE_BYTES:
            raise UsageError(
                f"--size: at least {max(args.workers) * STRIPE_BYTES >> 20}M, "
                f"a stripe for each of {max(args.workers)} workers"
            )
        return args.run_bench(args)
