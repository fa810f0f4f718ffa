"""Where the migration stream comes from: QEMU's -incoming addresses made into descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sharded_pc import address as addr
from sharded_pc.errors import HostError, RemoteProtocolError, UsageError
from sharded_pc.transport.accepting import BACKLOG
from sharded_pc.transport.candidates import Candidates
from sharded_pc.transport.channels import RECOVERY, SOURCE, Channel
from sharded_pc.transport.liveness import watch_peer

if TYPE_CHECKING:
    from sharded_pc.transport.tls.accepting import TlsAcceptor
    from sharded_pc.transport.tls.door import Door

log = logging.getLogger(__name__)

OPEN_TO_ALL = (
    "%s can be reached from other hosts, and the stream is neither encrypted nor authenticated: "
    "whoever reaches that port can send a guest of their own, and whoever is on the way can read "
    "and change the guest's memory; use TLS (--tls-creds), or a network that you trust"
)


class Wire:
    """A connected stream.  `fd` is read; `back_fd` is written, -1 where there is no way back.
    `broken_by()` says, once it has ended, why, where the kernel does not know (TLS)."""

    def __init__(
        self,
        fd: int,
        back_fd: int,
        close: Callable[[], None],
        broken_by: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.fd = fd
        self.back_fd = back_fd
        self._close = close
        self.broken_by = broken_by

    def hang_up(self) -> None:
        """The peer sees the end, also where other processes have the wire open."""
        with contextlib.suppress(OSError), socket.fromfd(self.fd, *_STREAM) as sock:
            sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._close()


_STREAM = (socket.AF_UNIX, socket.SOCK_STREAM)
"""What shutdown(2) does not ask about."""


def _prepare(sock: socket.socket, keep_alive: addr.KeepAlive) -> None:
    """What a connection over a network needs; before anything is put around it."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        watch_peer(sock, keep_alive)
    sock.setblocking(False)


def _from_socket(sock: socket.socket) -> Wire:
    why = getattr(sock, "broken_by", lambda: None)
    return Wire(sock.fileno(), sock.fileno(), sock.close, why)


class _How(NamedTuple):
    """How a source is to come: what it says first, and through which door."""

    wanted: bytes
    door: Door | None


class Listener:
    """A place a source can connect to, or one that needs no connecting.

    `address` is what a source must be told (with the real port); accept() waits for one source,
    whoever else comes.
    """

    def __init__(self, address: addr.Address) -> None:
        self.address = address

    async def accept(self) -> Wire:
        """RemoteProtocolError if the source opens several connections; HostError."""
        raise NotImplementedError

    async def channel(self) -> Channel:
        """The next further channel of the source; for ever where there can be none."""
        return await asyncio.get_running_loop().create_future()

    def wire(self, channel: Channel) -> Wire:
        """Of a further channel, which is the wire's from now on."""
        raise NotImplementedError

    def settle(self) -> bool:
        """When the source sends RAM: strangers who say nothing are let go.  Whether a channel of
        the source is open that has said nothing yet."""
        return False

    def withdraw(self) -> None:
        """The source has connected all its channels: a killed receiver leaves no file behind."""

    def close(self) -> None:
        """Stops listening and removes what was made for it."""


class _SocketListener(Listener):
    def __init__(
        self, address: addr.Address, sock: socket.socket, how: _How, path: str | None = None
    ) -> None:
        super().__init__(address)
        keep_alive = getattr(address, "keep_alive", addr.KeepAlive())
        self._prepare = functools.partial(_prepare, keep_alive=keep_alive)
        acceptor = how.door and _tls_acceptor(sock, how.door, self._prepare)
        self._candidates = Candidates(sock, how.wanted, acceptor)
        self._path = path

    async def accept(self) -> Wire:
        return self.wire(await self._candidates.source())

    async def channel(self) -> Channel:
        return await self._candidates.channel()

    def wire(self, channel: Channel) -> Wire:
        self._prepare(channel.sock)
        return _from_socket(channel.sock)

    def settle(self) -> bool:
        return self._candidates.settle()

    def close(self) -> None:
        self._candidates.close()
        self.withdraw()

    def withdraw(self) -> None:
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._path = None


class _ReadyListener(Listener):
    """A wire that is there from the start."""

    def __init__(self, address: addr.Address, wire: Wire) -> None:
        super().__init__(address)
        self._wire: Wire | None = wire

    async def accept(self) -> Wire:
        """The wire; a second call waits for ever, as nobody else can come."""
        if self._wire is None:
            await asyncio.get_running_loop().create_future()
        wire, self._wire = self._wire, None
        assert wire is not None
        return wire

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None


class _ReadySocket(Listener):
    """A connected socket that `door` has still to open."""

    def __init__(self, address: addr.Address, sock: socket.socket, door: Door) -> None:
        super().__init__(address)
        self._sock: socket.socket | None = sock
        self._door = door

    async def accept(self) -> Wire:
        """As _ReadyListener's; RemoteProtocolError if the peer does not get through."""
        if self._sock is None:
            await asyncio.get_running_loop().create_future()
        sock, self._sock = self._sock, None
        assert sock is not None
        try:
            return _from_socket(await self._door.open(sock, str(self.address)))
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{self.address}: {error}") from None

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _tls_acceptor(
    sock: socket.socket, door: Door, prepare: Callable[[socket.socket], None]
) -> TlsAcceptor:
    from sharded_pc.transport.tls.accepting import TlsAcceptor  # ssl is loaded where it is used

    return TlsAcceptor(sock, door, prepare)


def _tcp(where: addr.TcpAddress, how: _How) -> Listener:
    host = where.host or None
    infos = socket.getaddrinfo(host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, proto, _, sockaddr = infos[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    host, port, *_ = sock.getsockname()
    if how.door is None and not addr.is_loopback(host):
        log.warning(OPEN_TO_ALL, where)
    return _SocketListener(dataclasses.replace(where, port=port), sock, how)


def bind_unix(path: str) -> socket.socket:
    """A listening Unix socket that only this user may connect to, non-blocking.  A socket that
    nobody listens on any more is replaced; a live one, or another file, is not: HostError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead_socket(path)
        os.fchmod(sock.fileno(), 0o600)  # bind() takes it over: it is never open to others
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise HostError(f"make the socket {path}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock


def _remove_dead_socket(path: str) -> None:
    """Probes with a datagram socket: a stream listener refuses it as EPROTOTYPE.  A stream that
    connects to a live receiver would have to be told from its source."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except OSError as error:
                if error.errno != errno.EPROTOTYPE:
                    raise


def _unix(where: addr.UnixAddress, how: _How) -> Listener:
    return _SocketListener(where, bind_unix(where.path), how, where.path)


def _fd(where: addr.FdAddress, how: _How) -> Listener:
    try:
        mode = os.fstat(where.fd).st_mode
    except OSError:
        raise UsageError(f"{where}: descriptor {where.fd} is not open in this process") from None
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=where.fd)
        _prepare(sock, addr.KeepAlive())
        return _ReadySocket(where, sock, how.door) if how.door else _ready(where, sock)
    _refuse_tls(where, how)
    return _ReadyListener(where, Wire(where.fd, -1, lambda: os.close(where.fd)))


def _ready(where: addr.Address, sock: socket.socket) -> Listener:
    return _ReadyListener(where, _from_socket(sock))


def _refuse_tls(where: addr.Address, how: _How) -> None:
    if how.door is not None:
        raise UsageError(f"{where}: there is no TLS without a socket: leave --tls-creds out")


def _exec(where: addr.ExecAddress, how: _How) -> Listener:
    """Standard input and output of the command are one end of a socket pair: both directions."""
    _refuse_tls(where, how)
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen(
            ["/bin/sh", "-c", where.command], stdin=theirs, stdout=theirs, start_new_session=True
        )

    def close() -> None:
        ours.close()
        try:
            child.wait(timeout=1)
        except subprocess.TimeoutExpired:
            # It and what it started share a session of their own.
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()

    ours.setblocking(False)
    return _ReadyListener(where, Wire(ours.fileno(), ours.fileno(), close))


def _file(where: addr.FileAddress, how: _How) -> Listener:
    _refuse_tls(where, how)
    fd = os.open(where.path, os.O_RDONLY | os.O_CLOEXEC)
    os.lseek(fd, where.offset, os.SEEK_SET)
    return _ReadyListener(where, Wire(fd, -1, lambda: os.close(fd)))


_KINDS = {
    addr.TcpAddress: _tcp,
    addr.UnixAddress: _unix,
    addr.FdAddress: _fd,
    addr.ExecAddress: _exec,
    addr.FileAddress: _file,
}


def listen(where: addr.Address, *, recovers: bool = False, door: Door | None = None) -> Listener:
    """Makes the place a source migrates to, or with `recovers` the one where the source of a paused
    migration comes again, through `door` if it is to speak TLS; HostError names it when that
    fails."""
    try:
        return _KINDS[type(where)](where, _How(RECOVERY if recovers else SOURCE, door))
    except OSError as error:
        raise HostError(f"{where}: {error.strerror or error}") from error
