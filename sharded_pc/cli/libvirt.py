"""`sharded-pc libvirt`: what libvirt on this host has to be told."""

from __future__ import annotations

import argparse

from sharded_pc.errors import ExitCode


class Libvirt:
    """`install-hook`: incoming domains that a rule chooses get our emulator."""

    name = "libvirt"
    help = "tell libvirt about us: install-hook"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        words = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
        text = "put our emulator into incoming domains; guests and least-memory of"
        text += " /etc/sharded-pc.toml say which"
        install = words.add_parser("install-hook", help=text, description=text)
        install.add_argument(
            "--emulator", metavar="PATH", help="default: the one beside this command"
        )

    def run(self, args: argparse.Namespace) -> int:
        from pathlib import Path

        from sharded_pc.libvirt.install import emulator, install_hook

        ours = Path(args.emulator).absolute() if args.emulator else emulator()
        print(f"installed {install_hook(ours)}: chosen domains get {ours}")
        print("libvirt sees its first hook when it is restarted: systemctl restart libvirtd")
        return int(ExitCode.COMPLETED)
