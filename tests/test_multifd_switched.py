"""Multifd before the switch, and what QEMU 10.1 allows with it behind: postcopy-preempt, and
recovery over new connections, which have no channels of multifd."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_pc.address import UnixAddress
from sharded_pc.dump import Walk
from sharded_pc.errors import HostError
from sharded_pc.testing.oracle import DIRTIED
from sharded_pc.wire import multifd as wire
from tests.control import Control
from tests.guest_process import GuestProcess
from tests.multifd_source import ChannelSource
from tests.preempt_source import PreemptSource
from tests.qemu import wait_until
from tests.synthetic import ORACLE, WAIT_S, Background, Receiving, connect, missing_pages

pytestmark = [pytest.mark.uffd, pytest.mark.usefixtures("placement")]

DATA = missing_pages(ORACLE, 0, DIRTIED)


class Noted:
    """A source's channel, and what was said on it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self.said = sock, b""

    def sendall(self, data: bytes) -> None:
        self.said += data
        self._sock.sendall(data)

    def __getattr__(self, name: str):
        return getattr(self._sock, name)


class BothSource(ChannelSource, PreemptSource):
    """As 10.1 does it: postcopy-preempt's channel comes at the switch, those of multifd stay."""

    def open_channel(self, number: int) -> Noted:
        sock = Noted(self._stack.enter_context(connect(self._uri)))
        sock.sendall(wire.opening(number, bytes(range(16))))
        return sock

    def open(self, uri: str) -> None:
        super().open(uri)
        self.preempt = Noted(self.preempt)

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
def migrating(folder: Path, name: str, stack: contextlib.ExitStack, **settings) -> Iterator[tuple]:
    """A receiver whose guest runs on what came by multifd, its source, a control client."""
    path, uri = str(folder / f"{name}.control"), f"{folder}/{name}.mig"
    settings = {"incoming": UnixAddress(uri), "control": path, **settings}
    receiver = stack.enter_context(Receiving(folder, name, **settings))
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


def test_each_channel_is_recorded(tmp_path, unique_name):
    """Byte by byte, and `dump` reads them all."""
    file = tmp_path / "recording"
    with (
        contextlib.ExitStack() as stack,
        migrating(tmp_path, unique_name, stack, record=str(file)) as (receiver, source, _),
        attached(receiver) as guest,
    ):
        for page in DATA[5:8]:
            ask_for(guest, source, page)
        end(receiver, source, guest)
    names = ["multifd-0", "multifd-1", "preempt"]
    for name, channel in zip(names, [*source.channels, source.preempt], strict=True):
        recorded = Path(f"{file}.{name}")
        assert recorded.read_bytes() == channel.said
        with recorded.open("rb", buffering=0) as stream:
            walk = Walk(stream)
            pages = [message.get("ram") for message in walk.messages()]
        assert walk.error is None and any(pages)
    assert sorted(tmp_path.glob("recording.*")) == [Path(f"{file}.{name}") for name in names]


def test_a_channel_that_cannot_be_recorded(tmp_path, unique_name):
    """Named before the source gets to its switch."""
    (tmp_path / "recording.multifd-1").mkdir()
    settings = {"record": str(tmp_path / "recording"), "incoming": UnixAddress(f"{tmp_path}/mig")}
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(Receiving(tmp_path, unique_name, **settings))
        source = BothSource(f"unix:{tmp_path}/mig", stack, flushes=True)
        with contextlib.suppress(OSError):
            source.set_up()
        with pytest.raises(HostError, match=r"record to .*recording\.multifd-1: Is a directory"):
            receiver.finish()


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
