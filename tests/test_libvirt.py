"""virsh migrates between two real libvirtd."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sharded_pc.libvirt import hook, install
from tests.libvirt.domain import QEMU, Domain
from tests.libvirt.host import Host
from tests.libvirt.pair import Pair

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.xdist_group("libvirt")]

AUTOMATIC = ("--postcopy", "--postcopy-after-precopy")


def test_plain_qemu(hosts: Pair, domain: Domain):
    """The hosts themselves: nothing of ours is between them."""
    domain.start(hosts.a)
    since = hosts.b.log_size()
    domain.migrate(hosts.a, hosts.b, *AUTOMATIC)
    assert hosts.b.statuses(since) == ["setup", "active", "postcopy-active", "completed"]
    domain.wait_passes(hosts.b)
    assert domain.state(hosts.b) == "running (migrated)"
    assert domain.name not in hosts.a.virsh("list", "--name")


STUB = "/var/lib/stub/qemu-stub"
"""An emulator that becomes QEMU and, for an incoming domain, leaves a note."""


@pytest.fixture
def hooks(hosts: Pair):
    """STUB on both hosts, and the hook as a user installs it; no other test has it."""
    for host in (hosts.a, hosts.b):
        host.run(sys.executable, "-m", "sharded_pc", "libvirt", "install-hook", "--emulator", STUB)
        host.restart_daemon()
        stub = host.folder / STUB.removeprefix("/var/")
        stub.parent.mkdir(exist_ok=True)
        note = 'case "$*" in *-incoming*) echo $$ > $0.pid;; esac'
        stub.write_text(f'#!/bin/sh\n{note}\nexec {QEMU} "$@"\n')
        stub.chmod(0o755)
    yield
    for host in (hosts.a, hosts.b):
        (host.folder / install.PLACE).unlink()
        rules(host).unlink()


def rules(host: Host) -> Path:
    return host.folder / f"etc/{hook.SETTINGS.removeprefix('/etc/')}"


def rule(host: Host, *lines: str) -> None:
    rules(host).write_text("\n".join(lines))


def test_the_hook_gives_incoming_domains_an_emulator_and_takes_it_back(
    hosts: Pair, domain: Domain, hooks
):
    """Neither the source nor the domain knows of it."""
    rule(hosts.b, f'guests = ["{domain.name}"]')
    rule(hosts.a, "guests = []")
    domain.start(hosts.a)
    domain.migrate(hosts.a, hosts.b, *AUTOMATIC)
    assert domain.emulator(hosts.b) == STUB
    assert int((hosts.b.folder / f"{STUB.removeprefix('/var/')}.pid").read_text()) == hosts.b.qemu(
        domain.name
    )
    domain.wait_passes(hosts.b)
    domain.migrate(hosts.b, hosts.a, *AUTOMATIC)
    assert domain.emulator(hosts.a) == QEMU
    domain.wait_passes(hosts.a)
