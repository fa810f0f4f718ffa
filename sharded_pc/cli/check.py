"""`sharded-pc check`: can this host do it?"""

from __future__ import annotations

import argparse
import dataclasses
import json

from sharded_pc.errors import ExitCode


class Check:
    """Prints findings, of `host` or of `libvirt`; ExitCode.HOST when a required one failed."""

    name = "check"
    help = "can this host do it? each missing thing with its remedy"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
        parser.add_argument(
            "--libvirt", action="store_true",
            help="can its libvirt do it? as the user of libvirt's QEMUs, confined as they are",
        )  # fmt: skip

    def run(self, args: argparse.Namespace) -> int:
        found = of_libvirt() if args.libvirt else of_host()
        ok = all(each.ok or not each.required for each in found)
        print(as_json(ok, found) if args.json else as_table(ok, found))
        return ExitCode.COMPLETED if ok else ExitCode.HOST


# Both load the C core, which --help does without.


def of_host():
    from sharded_pc.host import findings

    return findings()


def of_libvirt():
    from sharded_pc.libvirt.findings import findings

    return findings()


def as_json(ok: bool, found) -> str:
    return json.dumps({"ok": ok, "findings": [dataclasses.asdict(each) for each in found]})


def as_table(ok: bool, found) -> str:
    """One line per finding, its remedy below it when it failed, and the verdict."""
    width = max(len(each.name) for each in found)
    lines = [line for each in found for line in _lines(each, width)]
    verdict = "this host can receive" if ok else "this host cannot receive: see FAIL"
    return "\n".join([*lines, "", verdict])


def _lines(finding, width: int) -> list[str]:
    mark = "ok" if finding.ok else "FAIL" if finding.required else "info"
    lines = [f"{mark:<4}  {finding.name:<{width}}  {finding.detail}"]
    if finding.remedy:
        lines.append(f"{'':<{width + 8}}remedy: {finding.remedy}")
    return lines
