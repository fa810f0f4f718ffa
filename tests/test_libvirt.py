"""virsh migrates between two real libvirtd."""

from __future__ import annotations

import pytest

from tests.libvirt.domain import Domain
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
