"""`sharded-pc demo`: source, receiver and guest in one command, every byte checked."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys

from sharded_pc import processes
from sharded_pc.cli.receive import Signals
from sharded_pc.errors import Cancelled, ExitCode, ShardedPcError, UsageError

TIMEOUT_SECONDS = 60.0


def _mib(text: str) -> int:
    """'512M', '2G' or a number of MiB, as QEMU's -m; bytes."""
    scale = {"M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    digits = text[:-1] if scale else text
    if not digits.isdigit() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 512M or 2G")
    return int(digits) * (scale or 1 << 20)


class Demo:
    """Shows a postcopy migration without any QEMU."""

    name = "demo"
    help = "source, receiver and guest in one command, verified"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--size", type=_mib, default=512 << 20, help="of the RAM (default 512M)"
        )
        parser.add_argument("--workers", type=int, default=2, metavar="N", help="default 2")
        parser.add_argument("--no-progress", action="store_true")

    def run(self, args: argparse.Namespace) -> int:
        if args.size < 16 << 20:
            raise UsageError("--size: at least 16M, so that there is something to see")
        return asyncio.run(_demo(args))


def _oracle(size: int):
    """One big block, as a PC's RAM is, and one small one."""
    from sharded_pc.geometry import RamBlock
    from sharded_pc.testing.oracle import PageOracle

    return PageOracle((RamBlock("pc.ram", size), RamBlock("vga.vram", 8 << 20)), seed=size)


def _source(answer, path: str, size: int) -> None:
    """The source's process."""
    from sharded_pc.source import SyntheticSource

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(path)
            SyntheticSource(sock, _oracle(size), bandwidth=size / 4).migrate()
    except (ShardedPcError, OSError) as error:
        answer.send(str(error))
    else:
        answer.send(None)


def _guest(answer, path: str, size: int) -> None:
    """The guest's process: visits every page once while they stream in, then checks all again."""
    import sharded_pc
    from sharded_pc.testing.guest import Visitor, WrongPage

    try:
        with sharded_pc.attach(path, timeout=TIMEOUT_SECONDS) as guest:
            visitor = Visitor(guest, _oracle(size))
            visit = visitor.visit()
            guest.wait(TIMEOUT_SECONDS)
            visitor.check()
    except (ShardedPcError, OSError, WrongPage) as error:
        answer.send(str(error))
    else:
        answer.send((visit.pages, visit.written, sorted(visit.latencies)))


class _Child:
    """A process and the answer it owes."""

    def __init__(self, target, *args: object) -> None:
        self.process, self._answer = processes.start(
            target, *args, name=f"the demo's {target.__name__.strip('_')}", daemon=True
        )

    def answer(self):
        if not self._answer.poll(TIMEOUT_SECONDS):
            return f"{self.process.name} did not finish in {TIMEOUT_SECONDS:.0f} s"
        try:
            return self._answer.recv()
        except EOFError:
            return f"{self.process.name} died"

    def end(self) -> None:
        self.process.kill()
        self.process.join()


async def _demo(args: argparse.Namespace) -> int:
    from sharded_pc.address import UnixAddress
    from sharded_pc.coordinator import Coordinator, Settings
    from sharded_pc.observe.progress import Progress, summary
    from sharded_pc.runtime_folder import ATTACH, MIGRATION, runtime_path

    name = f"demo-{os.getpid()}"
    stream, attach = runtime_path(name, MIGRATION), runtime_path(name, ATTACH)
    settings = Settings(
        incoming=UnixAddress(stream), name=name, workers=args.workers, attach=attach
    )
    signals = Signals()
    async with Coordinator(settings) as coordinator:
        signals.call(coordinator.quit)
        children = [_Child(_guest, attach, args.size), _Child(_source, stream, args.size)]
        try:
            async with Progress(coordinator.memory, enabled=not args.no_progress):
                info = await asyncio.wait_for(coordinator.receive(), TIMEOUT_SECONDS)
            guest, source = [await asyncio.to_thread(child.answer) for child in children]
        except Cancelled:
            return signals.exit_code
        finally:
            for child in children:
                child.end()
    print(summary(info))
    return _verdict(guest, source)


def _verdict(guest: object, source: object) -> int:
    for name, answer in (("source", source), ("guest", guest)):
        if isinstance(answer, str):
            print(f"sharded-pc: the demo's {name} failed: {answer}", file=sys.stderr)
            return int(ExitCode.FAILED)
    assert isinstance(guest, tuple)
    pages, written, latencies = guest
    at = {p: latencies[min(len(latencies) * p // 100, len(latencies) - 1)] / 1000 for p in (50, 99)}
    print(
        f"guest: visited {pages} pages in random order while they came, rewrote {written}; "
        f"a first touch took {at[50]:.1f} us (median), {at[99]:.0f} us (99th percentile)"
    )
    print("every byte was checked against the source, then and after the end: all right")
    return int(ExitCode.COMPLETED)
