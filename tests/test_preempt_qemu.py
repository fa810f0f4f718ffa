"""Real QEMUs with the capability postcopy-preempt: pages that are asked for come on a channel of
their own, which 7.2 opens at the start and a newer one as it switches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import wait_until
from tests.qemu.guest_image import MIB
from tests.qemu.vm import QmpConnection
from tests.receiver import Receiver
from tests.test_receive_qemu import (
    Toucher,
    begin_precopy,
    booted,
    check_equal,
    check_postcopy,
    check_touched,
    switch,
)
from tests.test_recovery_qemu import Operator, Successor, check_end, kill, operated
from tests.test_run_qemu import Pair, check_missing, check_whole, pair

pytestmark = [
    pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(120),
    pytest.mark.usefixtures("placement"),
]  # fmt: skip


def ask_for_preempt(vms: Pair) -> None:
    vms.source.set_capabilities(postcopy_ram=True, postcopy_preempt=True)


def preempt_pages(info: dict[str, Any]) -> int:
    return info["sharded"]["preempt-pages"]


def test_run(tmp_path, unique_name, binary):
    """A guest that goes on here and checks itself; what it asks for does not come on the main
    channel, but where the background scan, at full speed at the end, is there first."""
    with pair(tmp_path, unique_name, binary, smp=2) as vms:
        ask_for_preempt(vms)
        info = check_whole(vms)
    assert preempt_pages(info) > 0.2 * info["ram"]["postcopy-requests"] > 8


@contextmanager
def preempting(folder: Path, name: str, binary, *options: str) -> Iterator[Operator]:
    with operated(folder, name, binary, *options, prepare=ask_for_preempt) as operator:
        yield operator


def asked_for(operator: Operator) -> int:
    return preempt_pages(operator.vms.runner.look())


class TestRecovery:
    def test_cut_and_recovered_twice(self, tmp_path, unique_name, binary):
        """Both channels come again, first the main one."""
        with preempting(tmp_path, unique_name, binary) as operator:
            for by in ("source", "receiver"):
                operator.cut(by)
                paused = operator.vms.runner.look()
                check_missing(paused, 0.3)
                operator.recover()
                wait_until(lambda p=paused: asked_for(operator) > preempt_pages(p), "a page")
            check_end(operator)

    def test_the_source_comes_again_unasked(self, tmp_path, unique_name, binary):
        uri = f"unix:{tmp_path}/again"
        with preempting(tmp_path, unique_name, binary, "--recover-uri", uri) as operator:
            operator.vms.source.qmp("migrate-pause")
            operator.vms.source.wait_migration("postcopy-paused")
            operator.wait("postcopy-recover-setup")
            operator.vms.source.migrate(uri, resume=True)
            operator.wait("postcopy-active", "completed")
            check_end(operator)


def test_a_killed_receiver_is_resumed(tmp_path, unique_name, binary):
    """Its successor, too, takes both channels."""
    with preempting(tmp_path, unique_name, binary) as operator:
        vms, dead = operator.vms, operator.vms.runner
        kill(dead, workers=True)
        vms.source.wait_migration("postcopy-paused")
        with Successor(
            tmp_path, unique_name, vms.guest, "--control", f"{tmp_path}/c2"
        ) as vms.runner:
            operator.control.close()
            operator.control = QmpConnection(tmp_path / "c2")
            before = preempt_pages(vms.runner.look())
            operator.wait("postcopy-paused")
            operator.recover()
            wait_until(lambda: asked_for(operator) > before, "a page")
            check_end(operator)
            assert vms.runner.finish().exit_code == 0
        dead._outcome = vms.runner._outcome


def test_guests_that_attach(tmp_path, unique_name, binary):
    """Two of them: with `copy` no guest's own userfaultfd does for both."""
    with (
        booted(tmp_path, binary) as source,
        Receiver(tmp_path, unique_name, "tcp:127.0.0.1:0") as receiver,
    ):
        source.set_capabilities(postcopy_ram=True, postcopy_preempt=True)
        begin_precopy(source, receiver.uri())
        switch(source, postcopy_rate=2 * MIB)
        with Toucher(receiver) as guest, Toucher(receiver, number=1) as other:
            for each in (guest, other):
                each.wait_ready()
                each.wait_touched()
            source.set_parameters(max_postcopy_bandwidth=0)
            for each in (guest, other):
                each.go_on()
            touched = [each.finish() for each in (guest, other)]
        outcome = receiver.finish()
        check_equal(source, receiver, outcome)
        for pages in touched:
            check_touched(source, pages, 200)
    check_postcopy(outcome.info)
    assert preempt_pages(outcome.info) > 10


def test_a_busy_guest(tmp_path, unique_name, newer):
    with booted(tmp_path, newer, writes=True, smp=2) as source:
        with Receiver(tmp_path, unique_name) as receiver:
            source.set_capabilities(postcopy_ram=True, postcopy_preempt=True)
            begin_precopy(source, receiver.uri())
            switch(source)
            check_equal(source, receiver, receiver.finish())
        assert source.wrong_words() == []


def test_completed_in_precopy(tmp_path, unique_name, binary):
    """The channel is there (7.2) or not, and nothing ever comes on it."""
    with booted(tmp_path, binary) as source, Receiver(tmp_path, unique_name) as receiver:
        source.set_capabilities(postcopy_ram=True, postcopy_preempt=True)
        begin_precopy(source, receiver.uri(), rate=1 << 30)
        outcome = receiver.finish()
        check_equal(source, receiver, outcome)
    assert outcome.info["postcopy-state"] == "advise" and preempt_pages(outcome.info) == 0


def test_an_old_machine_type_of_a_newer_source(tmp_path, unique_name, newer):
    """Its channel is opened at the start and ended with a word, as 7.2 does."""
    with pair(tmp_path, unique_name, newer, machine="pc-i440fx-7.2") as vms:
        ask_for_preempt(vms)
        info = check_whole(vms)
    assert preempt_pages(info) > 100
