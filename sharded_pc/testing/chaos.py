"""A proxy for one wire after the other that splits, delays, stalls, cuts, resets and half-opens.

What happens is written down beforehand (faults.py).  One thread serves all connections: it waits in
poll(2), and ends with the `with` block.

    with ChaosProxy(UnixAddress(path), receiver, lambda number: storm(number, 1 << 20)) as proxy:
        connect_to(proxy.address)
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from sharded_pc.address import Address, TcpAddress, UnixAddress
from sharded_pc.testing.faults import FINE, Fault, Way, Weather
from sharded_pc.testing.relay import FOR_EVER, Relay

CONNECT_SECONDS = 5.0
END_SECONDS = 5.0


class ChaosProxy:
    """Listens at `address` (tcp port 0: any) and connects to `target`, which may be another one for
    the next connection.  `plan(number)` is the weather of each connection, counted from 0;
    `on_fault(number, fault)` hears on the proxy's thread what happens now."""

    def __init__(
        self,
        address: Address,
        target: Address,
        plan: Callable[[int], Weather] = lambda number: FINE,
        on_fault: Callable[[int, Fault], None] = lambda number, fault: None,
    ) -> None:
        self.target = target
        self.happened: list[tuple[int, Fault]] = []
        self._plan = plan
        self._on_fault = on_fault
        self._news = threading.Condition()
        self._relays: list[Relay] = []
        self._count = 0
        self._listening = _listen(address)
        self.address = _address(self._listening)
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._is_ending = self._drops = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="chaos-proxy", daemon=True)

    def __enter__(self) -> ChaosProxy:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_ending = True
        self._wake.send(b"!")
        self._thread.join(END_SECONDS)
        assert not self._thread.is_alive(), "the proxy does not end"
        self._wake.close()
        self._woken.close()
        if self._error is not None:
            raise self._error

    def drop(self) -> None:
        """Cuts every connection there is: somebody has found out about a silence."""
        self._drops = True
        self._wake.send(b"!")

    def wait_happened(self, count: int, timeout: float) -> bool:
        """True when so many faults have happened."""
        with self._news:
            return self._news.wait_for(lambda: len(self.happened) >= count, timeout)

    def forwarded(self, number: int) -> dict[Way, int]:
        """Bytes that went through a connection."""
        return {way: pipe.sent for way, pipe in self._relays[number].pipes.items()}

    def _run(self) -> None:
        try:
            while not self._is_ending:
                self._wait()
                self._step()
        except Exception as error:  # of `plan` or `on_fault`; raised where the block ends
            self._error = error
        finally:
            self._close()

    def _open(self) -> list[Relay]:
        return [relay for relay in self._relays if not relay.is_closed]

    def _wait(self) -> None:
        now, poll = time.monotonic(), select.poll()
        wanted = {self._listening.fileno(): select.POLLIN, self._woken.fileno(): select.POLLIN}
        for relay in self._open():
            for sock, events in relay.wants(now):
                wanted[sock.fileno()] = wanted.get(sock.fileno(), 0) | events
        for fd, events in wanted.items():
            poll.register(fd, events)
        until = min((relay.wakes(now) for relay in self._open()), default=FOR_EVER)
        poll.poll(None if until == FOR_EVER else max(until - now, 0) * 1000 + 0.1)

    def _step(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(64)
        if self._drops:
            self._drops = False
            for relay in self._open():
                relay.cut()
        with contextlib.suppress(BlockingIOError):
            self._accept(self._listening.accept()[0])
        now = time.monotonic()
        for relay in self._open():
            relay.step(now)

    def _accept(self, near: socket.socket) -> None:
        """Who cannot be connected is closed, and is not counted."""
        with contextlib.ExitStack() as undo:
            undo.callback(near.close)
            try:
                far = undo.enter_context(_connect(self.target))
            except OSError:
                return
            number, self._count = self._count, self._count + 1
            weather = self._plan(number)
            self._relays.append(Relay(near, far, weather, lambda f: self._tell(number, f)))
            undo.pop_all()

    def _tell(self, number: int, fault: Fault) -> None:
        self._on_fault(number, fault)
        with self._news:
            self.happened.append((number, fault))
            self._news.notify_all()

    def _close(self) -> None:
        for relay in self._open():
            relay.close()
        self._listening.close()
        if isinstance(self.address, UnixAddress):
            os.unlink(self.address.path)


def _listen(where: Address) -> socket.socket:
    match where:
        case UnixAddress(path):
            sock, place = socket.socket(socket.AF_UNIX), path
        case TcpAddress(host, port):
            sock, place = socket.socket(_family(host)), (host, port)
        case _:
            raise ValueError(f"{where}: nobody can connect there")
    sock.bind(place)
    sock.listen()
    sock.setblocking(False)
    return sock


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _address(sock: socket.socket) -> Address:
    name = sock.getsockname()
    return UnixAddress(name) if sock.family == socket.AF_UNIX else TcpAddress(name[0], name[1])


def _connect(where: Address) -> socket.socket:
    """OSError."""
    if isinstance(where, TcpAddress):
        sock = socket.create_connection((where.host, where.port), CONNECT_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    assert isinstance(where, UnixAddress), f"{where}: nobody listens there"
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(CONNECT_SECONDS)
        sock.connect(where.path)
    except OSError:
        sock.close()
        raise
    return sock
