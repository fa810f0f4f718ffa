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
        text = "put our emulator into incoming domains that [hook] of /etc/sharded-pc.toml chooses"
        words.add_parser("install-hook", help=text, description=text)

    def run(self, args: argparse.Namespace) -> int:
        from sharded_pc.libvirt import hook
        from sharded_pc.libvirt.install import install_hook

        print(f"installed {install_hook()}; the rule is [hook] in {hook.SETTINGS}")
        print("libvirt sees its first hook when it is restarted: systemctl restart libvirtd")
        return int(ExitCode.COMPLETED)
