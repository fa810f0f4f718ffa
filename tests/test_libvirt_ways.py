"""All ways of libvirt's to migrate, from plain QEMU into shards, and what may break meanwhile."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from sharded_pc.libvirt import hook
from tests.emulator import PROGRAM
from tests.libvirt import settings
from tests.libvirt.domain import QEMU, Domain
from tests.libvirt.host import TIMEOUT_S, Host, VirshError
from tests.libvirt.pair import Pair
from tests.qemu import wait_until
from tests.test_libvirt_check import CONTRIB, DEFAULTS, DEVICE

pytestmark = [
    pytest.mark.libvirt, pytest.mark.qemu, pytest.mark.uffd, pytest.mark.xdist_group("libvirt"),
]  # fmt: skip

OURS = str(PROGRAM)
SETUP, POSTCOPY = ["setup", "active"], ["postcopy-active"]
RECOVERY = ["postcopy-paused", "postcopy-recover", "postcopy-active"]
AUTOMATIC = ("--postcopy", "--postcopy-after-precopy")
RESUME = ("--postcopy", "--postcopy-resume")
SLOW, FAST = 1, 1000
"""MiB/s of postcopy: slowly it lasts until a test is done with it."""


class Incoming:
    """A domain on its way from `a` to `b`, where it has the emulator: by its XML, or `hooked`."""

    def __init__(self, a: Host, b: Host, domain: Domain, *, hooked: bool = False) -> None:
        self.a, self.b, self.domain = a, b, domain
        self._xml = None if hooked else domain.xml(OURS)
        self._virsh: subprocess.Popen[str] | None = None
        self.since = self.b.log_size()
        domain.start(self.a)

    def start(self, *options: str, **more) -> None:
        self._is_slow = more.get("postcopy_mib_s") == SLOW
        self._virsh = self.domain.start_migration(self.a, self.b, *options, xml=self._xml, **more)

    def start_postcopy(self, *options: str) -> None:
        """Returns when the guest runs there, most of its memory being here: what it does not ask
        for is sent slowly, before and after."""
        at = self.a.log_size()
        self.start("--postcopy", *options, mib_s=SLOW, postcopy_mib_s=SLOW)
        self.wait(lambda: "active" in self.a.statuses(at))
        self.a.virsh("migrate-postcopy", self.domain.name)
        self.wait(self.runs_there)
        self.receiver()

    def runs_there(self) -> bool:
        """Most of its memory being here."""
        listed = self.b.virsh("list", "--name").split()
        return self.domain.name in listed and self.domain.state(self.b) == "running (post-copy)"

    def receiver(self) -> int:
        """Its process's number at `b`, of the only domain there."""
        return self.b.processes(" emulate ")[0]

    def has_paused(self) -> bool:
        return self.domain.state(self.b) == "running (post-copy failed)"

    def wait_paused(self) -> None:
        """virsh has failed at the source; the destination hears of it by itself."""
        assert "failed in post-copy phase" in self.fails()
        wait_until(self.has_paused, "the pause", TIMEOUT_S)

    def wait(self, condition: Callable[[], bool]) -> None:
        """While virsh is at work."""

        def come_true() -> bool:
            if condition():
                return True
            if self._virsh.poll() is not None:
                raise AssertionError(f"virsh ended: {self.finish()}{self.statuses()}")
            return False

        wait_until(come_true, "migration", TIMEOUT_S)

    def finish(self) -> str:
        """The rest as fast as it can; what virsh says."""
        if self._is_slow:
            self.hurry()
        return self.a.finish(self._virsh)

    def hurry(self) -> None:
        """QEMU is told, for libvirt may know of no migration any more."""
        parameters = {"max-bandwidth": FAST << 20, "max-postcopy-bandwidth": 0}
        command = {"execute": "migrate-set-parameters", "arguments": parameters}
        with contextlib.suppress(VirshError):  # it has ended
            self.a.virsh("qemu-monitor-command", self.domain.name, json.dumps(command))

    def close(self) -> None:
        """virsh is not waited for, whatever the test has left."""
        if self._virsh is not None and self._virsh.poll() is None:
            self._virsh.kill()
            self._virsh.communicate()

    def fails(self) -> str:
        """What virsh says."""
        with pytest.raises(VirshError) as failed:
            self.a.finish(self._virsh)
        return failed.value.said

    def statuses(self) -> list[str]:
        return self.b.statuses(self.since)

    def wait_arrived(self) -> None:
        """It runs at `b` alone, with all of its memory right."""
        self.domain.wait_passes(self.b)
        assert self.domain.state(self.b).startswith("running")
        assert self.domain.emulator(self.b) == OURS
        assert self.domain.name not in self.a.virsh("list", "--all", "--name").split()


@pytest.fixture
def incoming(hosts: Pair, domain: Domain) -> Iterator[Incoming]:
    with strict(hosts.b), contextlib.closing(Incoming(hosts.a, hosts.b, domain)) as found:
        yield found


@contextlib.contextmanager
def strict(host: Host) -> Iterator[None]:
    """Shards or nothing: where QEMU would take a migration by itself, none is taken."""
    settings = host.folder / f"etc/{hook.SETTINGS.removeprefix('/etc/')}"
    settings.write_text("strict = true")
    try:
        yield
    finally:
        settings.unlink()


def test_postcopy_by_hand(incoming: Incoming):
    incoming.start_postcopy()
    assert incoming.b.locked_by(incoming.domain.name) == incoming.b.qemu(incoming.domain.name)
    incoming.finish()
    assert incoming.statuses() == [*SETUP, *POSTCOPY, "completed"]
    incoming.wait_arrived()


def test_postcopy_after_a_pass(incoming: Incoming):
    incoming.start(*AUTOMATIC)
    incoming.finish()
    assert incoming.statuses() == [*SETUP, *POSTCOPY, "completed"]
    incoming.wait_arrived()


def test_peer_to_peer_over_a_unix_socket(incoming: Incoming, hosts: Pair):
    socket = hosts.folder / f"{incoming.domain.name}.sock"
    incoming.start(*AUTOMATIC, "--p2p", uri=f"unix://{socket}")
    incoming.finish()
    assert incoming.statuses() == [*SETUP, *POSTCOPY, "completed"]
    incoming.wait_arrived()


@pytest.mark.parametrize(
    "how", ["", "--p2p", "--parallel --parallel-connections 2", "--compressed"]
)
def test_precopy_only(incoming: Incoming, how):
    incoming.start(*how.split(), mib_s=None)
    incoming.finish()
    assert incoming.statuses() == [*SETUP, "completed"]
    incoming.wait_arrived()


def test_tunnelled(incoming: Incoming):
    """libvirt hands a descriptor over, which only it knows of."""
    incoming.start("--p2p", "--tunnelled", uri=None, mib_s=None)
    incoming.finish()
    assert incoming.statuses() == [*SETUP, "completed"]
    incoming.wait_arrived()


@pytest.mark.parametrize("kills", [False, True], ids=["wire", "receiver"])
def test_tls(incoming: Incoming, kills):
    """The key is QEMU's user's, who runs the receiver as well."""
    incoming.start_postcopy("--tls")
    if kills:
        incoming.b.kill(incoming.receiver())
    else:
        incoming.a.virsh("domjobabort", "--postcopy", incoming.domain.name)
    incoming.wait_paused()
    incoming.start(*RESUME, "--tls")
    incoming.finish()
    incoming.wait_arrived()


def test_tls_without_certificates(incoming: Incoming, hosts: Pair):
    """What is wrong reaches virsh."""
    key = hosts.folder / "tls/server-key.pem"
    key.rename(key.with_suffix(".away"))
    try:
        incoming.start("--postcopy", "--tls")
        assert "server-key.pem" in incoming.fails()
    finally:
        key.with_suffix(".away").rename(key)


def test_cancel_in_precopy(incoming: Incoming):
    incoming.start("--postcopy", mib_s=4)
    incoming.wait(lambda: "active" in incoming.statuses())
    incoming.a.virsh("domjobabort", incoming.domain.name)
    assert "canceled by client" in incoming.fails()
    assert incoming.domain.name not in incoming.b.virsh("list", "--all", "--name").split()
    incoming.domain.wait_passes(incoming.a)
    assert incoming.domain.state(incoming.a).startswith("running")


def test_what_virsh_is_asked_during_postcopy(incoming: Incoming):
    """libvirt keeps what would change a domain, or ask its QEMU, until all is here: with plain
    QEMU as well."""
    incoming.start_postcopy()
    domain, b = incoming.domain, incoming.b
    assert "state.reason=10" in b.virsh("domstats", "--state", "--nowait", domain.name)
    assert "Memory remaining" in incoming.a.virsh("domjobinfo", domain.name)
    assert domain.name in b.virsh("dumpxml", domain.name)
    suspend, stats = (b.start_virsh(*each) for each in (
        ("suspend", domain.name), ("domblkstat", domain.name, "hda")
    ))  # fmt: skip
    incoming.finish()
    b.finish(suspend)
    assert "rd_req" in b.finish(stats)
    assert domain.state(b) == "paused (user)"
    b.virsh("resume", domain.name)
    assert incoming.statuses() == [*SETUP, *POSTCOPY, "completed"]
    incoming.wait_arrived()


def test_a_wire_that_breaks_twice(incoming: Incoming):
    incoming.start_postcopy()
    incoming.b.run("ss", "-K", "dst", "127.0.0.1", "sport", ">=", "49300", "sport", "<=", "49399")
    incoming.wait_paused()
    assert incoming.domain.state(incoming.a) == "paused (post-copy failed)"
    at = incoming.b.log_size()
    incoming.start(*RESUME, postcopy_mib_s=SLOW)
    incoming.wait(lambda: "postcopy-active" in incoming.b.statuses(at))
    incoming.a.virsh("domjobabort", "--postcopy", incoming.domain.name)
    incoming.wait_paused()
    incoming.start(*RESUME)
    incoming.finish()
    assert incoming.statuses() == [*SETUP, *POSTCOPY, *RECOVERY, *RECOVERY, "completed"]
    incoming.wait_arrived()


def test_receiver_killed_in_postcopy(incoming: Incoming):
    """Another one takes its place, and QEMU's process never knew."""
    incoming.start_postcopy()
    qemu = incoming.b.qemu(incoming.domain.name)
    incoming.b.kill(incoming.receiver())
    incoming.wait_paused()
    incoming.start(*RESUME)
    incoming.finish()
    incoming.wait_arrived()
    assert incoming.b.qemu(incoming.domain.name) == qemu


def test_destination_killed_in_postcopy(incoming: Incoming):
    incoming.start_postcopy()
    incoming.b.kill(incoming.b.qemu(incoming.domain.name))
    assert re.search("unexpectedly closed the monitor|domain is not running", incoming.fails())
    assert incoming.domain.state(incoming.a) == "paused (post-copy failed)"
    assert incoming.domain.name not in incoming.b.virsh("list", "--all", "--name").split()


def test_destroyed_in_postcopy(incoming: Incoming):
    """All of it is gone, the receiver as well; the source's is what is left of the guest."""
    incoming.start_postcopy()
    incoming.b.virsh("destroy", incoming.domain.name)
    incoming.fails()
    wait_until(lambda: not incoming.b.left(), "nothing left")
    assert incoming.domain.state(incoming.a) == "paused (post-copy failed)"


def test_source_killed_in_postcopy(incoming: Incoming):
    incoming.start_postcopy()
    incoming.a.kill(incoming.a.qemu(incoming.domain.name))
    incoming.wait_paused()
    assert incoming.statuses() == [*SETUP, *POSTCOPY, "postcopy-paused"]


@pytest.mark.parametrize("side", ["a", "b"])
def test_libvirtd_restarted_in_postcopy(incoming: Incoming, side):
    incoming.start_postcopy("--p2p")
    getattr(incoming, side).restart_daemon()
    incoming.fails()
    incoming.hurry()
    wait_until(lambda: "completed" in incoming.statuses(), "the end of the migration", TIMEOUT_S)
    incoming.domain.wait_passes(incoming.b)
    assert incoming.domain.state(incoming.b).startswith("running")


def onward(incoming: Incoming, how: Callable[[], None]) -> None:
    """The guest is an ordinary one: what libvirt does with plain QEMU works."""
    incoming.start(*AUTOMATIC)
    incoming.finish()
    incoming.wait_arrived()
    how()


@pytest.mark.parametrize("emulator", [QEMU, OURS], ids=["plain", "shards"])
def test_onward(incoming: Incoming, emulator):
    a, b, domain = incoming.a, incoming.b, incoming.domain
    onward(incoming, lambda: domain.migrate(b, a, *AUTOMATIC, xml=domain.xml(emulator)))
    domain.wait_passes(a)
    assert domain.name not in b.virsh("list", "--all", "--name").split()


def test_save_and_restore(incoming: Incoming):
    b, domain = incoming.b, incoming.domain
    file = b.folder / f"{domain.name}.saved"

    def save_and_restore() -> None:
        b.virsh("save", domain.name, file)
        b.virsh("restore", file)

    onward(incoming, save_and_restore)
    incoming.wait_arrived()


def test_snapshot(incoming: Incoming):
    """With its memory, of which all is here."""
    b, domain = incoming.b, incoming.domain
    file = b.folder / f"{domain.name}.memory"
    where = ("--memspec", f"file={file},snapshot=external", "--diskspec", "hda,snapshot=no")
    onward(incoming, lambda: b.virsh("snapshot-create-as", domain.name, "s", *where))
    assert file.stat().st_size > domain.memory_mib << 20 >> 1
    incoming.wait_arrived()
    b.virsh("snapshot-delete", domain.name, "s", "--metadata")


def test_debians_defaults_and_what_we_ship(hosts: Pair, domain: Domain):
    """docs/libvirt.md: an ordinary virsh, a domain that knows nothing, QEMU's user confined."""
    to = Host(hosts.folder / "d", 3, hosts.network, hosts.binary, DEFAULTS)
    with (to.folder / "etc/libvirt/qemu.conf").open("a") as conf:
        conf.write((CONTRIB / "qemu.conf").read_text())
    with to, strict(to), contextlib.ExitStack() as stack:
        to.run("chgrp", settings.USER, DEVICE)  # as udev does by the rule, with its group
        to.run("chmod", "660", DEVICE)
        to.run(sys.executable, "-m", "sharded_pc", "libvirt", "install-hook")
        to.restart_daemon()
        incoming = stack.enter_context(
            contextlib.closing(Incoming(hosts.a, to, domain, hooked=True))
        )
        incoming.start_postcopy()
        owner = to.run("ps", "-o", "user=", "-p", str(incoming.receiver())).strip()
        assert owner == settings.USER
        incoming.a.virsh("domjobabort", "--postcopy", domain.name)
        incoming.wait_paused()
        incoming.start(*RESUME)
        incoming.finish()
        incoming.wait_arrived()
        to.virsh("destroy", domain.name)
        wait_until(lambda: not to.left(), "nothing left")


def test_many_guests_at_once(hosts: Pair, four_domains: list[Domain]):
    """A host's evacuation: each domain has a receiver of its own."""
    domains = four_domains
    with strict(hosts.b), contextlib.ExitStack() as stack:
        incoming = [
            stack.enter_context(contextlib.closing(Incoming(hosts.a, hosts.b, domain)))
            for domain in domains
        ]
        for each in incoming:
            each.start_postcopy()
        told = hosts.b.run(sys.executable, "-m", "sharded_pc", "status")
        assert not [domain.name for domain in domains if domain.name not in told], told
        for each in incoming:
            each.finish()
            each.wait_arrived()
