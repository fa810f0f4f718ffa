"""`sharded-pc receive INCOMING`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from sharded_pc.address import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
)
from sharded_pc.cli import failed
from sharded_pc.errors import ExitCode, ShardedPcError, UsageError

if TYPE_CHECKING:
    from sharded_pc.settings import Settings
    from sharded_pc.transport.tls.credentials import Credentials


def add_receiver_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `receive` and `run` share."""
    parser.add_argument(
        "incoming",
        nargs="?",
        metavar="INCOMING",
        help="tcp:HOST:PORT (0: any port), unix:PATH, fd:N, exec:COMMAND or file:PATH",
    )
    parser.add_argument(
        "--name", help="of this receiver and its shared memory (default: guest-PID)"
    )
    parser.add_argument(
        "--resume",
        metavar="NAME",
        help="take up the receiver NAME that died while its guest ran; with INCOMING a source may "
        "come there if there is none",
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument(
        "--placement",
        choices=["auto", "copy", "continue"],
        default="auto",
        help="how pages become visible: UFFDIO_COPY, UFFDIO_CONTINUE, or what this host does best",
    )
    parser.add_argument(
        "--attach",
        metavar="PATH",
        help="socket where guests attach (default: in this receiver's folder)",
    )
    parser.add_argument(
        "--control", metavar="PATH", help="socket that speaks QMP (default: beside the other)"
    )
    _add_source_arguments(parser)
    _add_outcome_arguments(parser)


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """How a source may come, and come again."""
    parser.add_argument(
        "--recover-uri",
        metavar="URI",
        help="where the source of a paused migration may come again, without migrate-recover",
    )
    parser.add_argument(
        "--switchover-ack",
        action="store_true",
        help="the source's capability switchover-ack is on: tell it that it may switch",
    )
    parser.add_argument(
        "--tls-creds",
        metavar="DIR",
        help="speak TLS, also when recovering: ca-cert.pem, server-cert.pem, server-key.pem and "
        "perhaps ca-crl.pem; the source must show a certificate that this CA has signed",
    )
    parser.add_argument(
        "--tls-authz",
        metavar="DN",
        action="append",
        default=[],
        help="the source's certificate must have this distinguished name, as in CN=host,O=Example; "
        "may be given several times",
    )
    parser.add_argument(
        "--tls-psk",
        metavar="DIR",
        help="speak TLS with a key that both sides have, in keys.psk (Python 3.13)",
    )


def _add_outcome_arguments(parser: argparse.ArgumentParser) -> None:
    """What is kept, and told."""
    parser.add_argument("--record", metavar="FILE", help="write the stream down as it comes")
    parser.add_argument(
        "--keep", action="store_true", help="leave the RAM in shared memory on exit"
    )
    parser.add_argument(
        "--reserve",
        action="store_true",
        help="allocate all of the RAM before the source sends it: a /dev/shm that fills up later "
        "cannot end the guest",
    )
    parser.add_argument("--status-fd", type=int, metavar="N", help="gets one byte when listening")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--no-progress", action="store_true", help="no progress on standard error")
    parser.add_argument(
        "--log-level", default=argparse.SUPPRESS, choices=["debug", "info", "warning", "error"]
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """Coordinator settings from the command line; UsageError."""
    from sharded_pc import address
    from sharded_pc.geometry import Placement
    from sharded_pc.runtime_folder import ATTACH, CONTROL, runtime_path
    from sharded_pc.settings import Settings

    if args.status_fd is not None:
        try:
            os.fstat(args.status_fd)
        except OSError:
            raise UsageError(f"--status-fd {args.status_fd}: that descriptor is not open") from None
    if args.reserve and args.placement == "copy":
        raise UsageError(
            "--reserve: with --placement copy memory is allocated page by page as it arrives; use "
            "--placement continue"
        )
    if args.incoming is None and args.resume is None:
        raise UsageError(f"INCOMING is missing: {address.GRAMMAR}; or --resume NAME")
    if args.resume is not None and args.name not in (None, args.resume):
        raise UsageError(f"--resume {args.resume} and --name {args.name} are two receivers")
    name = args.resume or args.name or f"guest-{os.getpid()}"
    return Settings(
        incoming=None if args.incoming is None else address.parse(args.incoming),
        name=name,
        resume=args.resume is not None,
        workers=args.workers,
        placement=None if args.placement == "auto" else Placement(args.placement),
        attach=args.attach or runtime_path(name, ATTACH),
        control=args.control or runtime_path(name, CONTROL),
        recover_uri=recover_uri(args.recover_uri),
        switchover_ack=args.switchover_ack,
        tls=tls_of(args),
        record=args.record,
        keep=args.keep,
        reserve=args.reserve,
        status_fd=args.status_fd,
    )


def tls_of(args: argparse.Namespace) -> Credentials | None:
    """UsageError for options that do not go together; the files are not looked at."""
    if args.tls_creds is None and args.tls_psk is None:
        if args.tls_authz:
            raise UsageError("--tls-authz: names stand in certificates: give --tls-creds DIR too")
        return None
    from sharded_pc.transport.tls.credentials import X509, Psk  # ssl is loaded where it is used

    if args.tls_psk is None:
        return X509(args.tls_creds, tuple(args.tls_authz))
    if args.tls_creds is not None or args.tls_authz:
        raise UsageError("--tls-psk: with a shared key there is no certificate: leave --tls-creds "
                         "and --tls-authz out")  # fmt: skip
    return Psk(args.tls_psk)


def recover_uri(text: str | None) -> Address | None:
    """UsageError, also for what a source cannot come to twice."""
    from sharded_pc import address

    if text is None:
        return None
    uri = address.parse(text)
    if not isinstance(uri, TcpAddress | UnixAddress):
        raise UsageError(f"--recover-uri {text}: expected tcp:HOST:PORT or unix:PATH")
    return uri


class Receive:
    """Receives one migration and says how it went."""

    name = "receive"
    help = "receive a migration into shared memory; guests attach"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_receiver_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        return asyncio.run(_receive(args))


async def _receive(args: argparse.Namespace) -> int:
    return await Session(args, settings_of(args)).run(_leave)


async def _leave(session: Session) -> int:
    await session.coordinator.last_word()
    return int(ExitCode.COMPLETED)


class Session:
    """One migration from the command line: announces, shows progress, reports, ends on signals."""

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        from sharded_pc.coordinator import Coordinator
        from sharded_pc.transport.systemd import ServiceManager

        self._manager = ServiceManager()
        self._args = args
        self._settings = settings
        self.signals = Signals()
        self.coordinator = Coordinator(settings, self._listening)

    def _listening(self, address: object) -> None:
        if address is None:
            what = how = f"receiver {self._settings.name} goes on"
        else:
            what = f"awaits a source at {address}"
            ready = isinstance(address, FileAddress | FdAddress | ExecAddress)
            how = f"{'reading from' if ready else 'listening on'} {address}"
        self._manager.ready(what)
        print(how, file=sys.stderr)
        print(f"guests attach at {self._settings.attach}", file=sys.stderr)
        print(f"QMP is spoken at {self._settings.control}", file=sys.stderr, flush=True)
        if address is not None and not self._settings.reserve:
            print("RAM is taken from /dev/shm as it is touched; --reserve takes it all at once",
                  file=sys.stderr, flush=True)  # fmt: skip

    async def run(self, afterwards: Callable[[Session], Awaitable[int]]) -> int:
        """Receives; then `afterwards(session)` gives the exit code of a migration that has
        completed."""
        try:
            self.signals.call(self.coordinator.quit)
            async with self._manager, self.coordinator:
                info = await self._outcome()
                self._report(info)
                if self.coordinator.error is None:
                    return await afterwards(self)
                await self.coordinator.last_word()
        except ShardedPcError as error:
            # Before a source could connect: nothing to report but the error.
            return self.signals.exit_code or failed(error)
        return self.signals.exit_code or failed(self.coordinator.error)

    async def _outcome(self) -> dict:
        """migration_info, whether it went well or not; a failure is in `coordinator.error`."""
        from sharded_pc.observe.progress import Progress

        async with Progress(self.coordinator.memory, enabled=not self._args.no_progress):
            try:
                return await self.coordinator.receive()
            except ShardedPcError:
                return self.coordinator.info()

    def _report(self, info: dict) -> None:
        from sharded_pc.observe.progress import summary

        if self._args.json:
            print(json.dumps(info), flush=True)
        if info["status"] == "completed":
            print(summary(info), file=sys.stderr)


class Signals:
    """SIGINT, SIGTERM and SIGHUP end the receiver in order; the exit code says which it was."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._quit = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)

    def call(self, quit_) -> None:
        """What to do; at once if a signal came already."""
        self._quit = quit_
        if self.exit_code:
            quit_()

    def _on_signal(self, number: signal.Signals) -> None:
        self.exit_code = 128 + number
        if self._quit is not None:
            self._quit()
