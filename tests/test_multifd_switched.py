"""Multifd before the switch, and what QEMU 10.1 allows with it behind: postcopy-preempt, and
recovery over new connections, which have no channels of multifd."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc.address import UnixAddress
from sharded_pc.testing.oracle import DIRTIED
from tests.control import Control
from tests.guest_process import GuestProcess
from tests.multifd_source import ChannelSource
from tests.preempt_source import PreemptSource
from tests.qemu import wait_until
from tests.synthetic import ORACLE, WAIT_S, Background, Receiving, connect, missing_pages

pytestmark = [pytest.mark.uffd, pytest.mark.usefixtures("placement")]

DATA = missing_pages(ORACLE, 0, DIRTIED)


class BothSource(ChannelSource, PreemptSource):
    """As 10.1 does it: postcopy-preempt's channel comes at the switch, those of multifd stay."""

    def switch(self) -> None:
        wait_until(lambda: 1 in self.back.pongs, "the first PONG", WAIT_S)
        self.open(self._uri)
        super().switch()

    def lose(self, *, channels: bool) -> None:
        """The main channel and postcopy-preempt's, perhaps those of multifd."""
        cut = [self._sock, self.preempt, *(self.channels if channels else ())]
        for sock in cut:
            sock.shutdown(socket.SHUT_RDWR)

    def come_again(self, uri: str, stack: contextlib.ExitStack) -> None:
        self.preempt.close()
        sock = stack.enter_context(connect(uri))
        self.resume(sock)
        self.open(uri)


@contextlib.contextmanager
def migrating(folder: Path, name: str, stack: contextlib.ExitStack) -> Iterator[tuple]:
    """A receiver whose guest runs on what came by multifd, its source, a control client."""
    path, uri = str(folder / f"{name}.control"), f"{folder}/{name}.mig"
    receiver = stack.enter_context(Receiving(folder, name, incoming=UnixAddress(uri), control=path))
    source = BothSource(f"unix:{uri}", stack, flushes=True)
    control = stack.enter_context(contextlib.closing(Control(path)))
    source.begin()
    source.wait_switched()
    try:
        yield receiver, source, control
    finally:
        source.close_preempt()


@contextlib.contextmanager
def attached(receiver: Receiving) -> Iterator[GuestProcess]:
    with GuestProcess() as guest:
        guest.ask("attach", receiver.attach)
        yield guest


def ask_for(guest: GuestProcess, source: BothSource, page: int) -> None:
    """It comes on postcopy-preempt's channel."""
    guest.say("visit", 0, [page])
    assert source.request() == (0, page)
    source.send_requested(0, [page])
    assert guest.answer() is None


def end(receiver: Receiving, source: BothSource, guest: GuestProcess) -> dict:
    """A guest that reads everything finds it right."""
    guest.say("visit_all", 5)
    Background(source.end).result()
    assert guest.answer() == []
    info = receiver.finish()
    assert info["status"] == "completed" and info["error-desc"] is None
    return info


def test_with_preempt(tmp_path, unique_name):
    with (
        contextlib.ExitStack() as stack,
        migrating(tmp_path, unique_name, stack) as (receiver, source, _),
        attached(receiver) as guest,
    ):
        for page in DATA[5:8]:
            ask_for(guest, source, page)
        info = end(receiver, source, guest)
    assert info["sharded"]["preempt-pages"] >= 3


@pytest.mark.parametrize("channels", [True, False], ids=["all-cut", "multifd-stays"])
def test_recovered(tmp_path, unique_name, channels):
    with (
        contextlib.ExitStack() as stack,
        migrating(tmp_path, unique_name, stack) as (receiver, source, control),
        attached(receiver) as guest,
    ):
        ask_for(guest, source, DATA[5])
        for number in range(2):
            source.lose(channels=channels and number == 0)
            why = control.wait_status("postcopy-paused")["error-desc"]
            assert "was lost" in why or "closed" in why
            again = f"unix:{tmp_path}/again{number}"
            assert control.execute("migrate-recover", uri=again) == {}
            source.come_again(again, stack)
            ask_for(guest, source, DATA[10 + number])
        end(receiver, source, guest)
