"""The process beside a program that `sharded-pc guest` has started: finds receivers for it.

The program may be started before there is a receiver, and may not be able to reach one when it
maps its RAM: in another root, as another user, behind a filter of system calls.  So it keeps a
connection to this process from its beginning on (program/broker.h has the messages), and so does
each child that it forks or starts.  It asks whose a file is; here the file's name tells the
receiver's, and a connection to that is handed over, on which its attach protocol has begun.

It ends when the program and all its children have.  It knows nothing that could be lost: a program
whose broker was killed goes on, but cannot map RAM for the first time, nor come back to a
receiver's successor.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sharded_pc import runtime_folder
from sharded_pc.attach import protocol
from sharded_pc.errors import AttachError, ShardedPcError
from sharded_pc.native.control import Control
from sharded_pc.shm import CONTROL, ROOT, Segment, is_name
from sharded_pc.state import MigrationStatus
from sharded_pc.transport import fds
from sharded_pc.transport.peers import Peer, peer_of

log = logging.getLogger(__name__)

QUESTION = struct.Struct("=c7xQQ")
"""program/broker.c: what is wished, device, inode"""
RECEIVER, FILE, NEW = b"R", b"F", b"N"
NONE, SERVED, PLAIN, ERROR = b"n", b"r", b"p", b"e"
HELLO_SECONDS = 10.0
"""From the program's start to its library's first word."""
AGAIN_SECONDS = 0.05


class Broker:
    """Serves the program `leader` (a pidfd) and its children at a listening socket.

    `name`: the receiver whose RAM they may map, None: any of those that are trusted.  `attach`: its
    socket, if it is not where a receiver puts it.  Receivers belong to this user, to root, or to
    `user` (a uid).  `seconds`: for a receiver to listen.
    """

    def __init__(
        self,
        listener: socket.socket,
        leader: int,
        *,
        name: str | None,
        attach: str | None,
        user: int | None,
        seconds: float,
    ) -> None:
        self._listener = listener
        self._leader = leader
        self._name, self._attach, self._user, self._seconds = name, attach, user, seconds
        self._clients = 0
        self._changed = threading.Condition()

    def serve(self) -> None:
        """Returns when the program and all its children have ended, or it does not know us."""
        accepting = threading.Thread(target=self._accept, daemon=True)
        accepting.start()
        if not self._heard():
            log.error(
                "the program runs without the library of `sharded-pc guest` (a static or setuid "
                "binary?): it is ended, its RAM would not wait for missing pages"
            )
            signal.pidfd_send_signal(self._leader, signal.SIGKILL)
            return
        _wait_end(self._leader)
        with self._changed:
            self._changed.wait_for(lambda: not self._clients)

    def _heard(self) -> bool:
        """The program has said something, or has ended before."""
        deadline = time.monotonic() + HELLO_SECONDS
        with self._changed:
            while time.monotonic() < deadline:
                if self._clients or _has_ended(self._leader):
                    return True
                self._changed.wait(AGAIN_SECONDS)
        return False

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):  # it is closed
                    return
                time.sleep(AGAIN_SECONDS)  # descriptors are short: they wait in the queue
            else:
                self._begin(client)

    def _begin(self, client: socket.socket) -> None:
        if not self._is_trusted(peer_of(client)):
            client.close()
            return
        with self._changed:
            self._clients += 1
            self._changed.notify_all()
        threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _is_trusted(self, peer: Peer) -> bool:
        return peer.is_trusted or peer.uid == self._user

    def _serve(self, client: socket.socket) -> None:
        try:
            while data := self._hear(client):
                self._answer(client, data)
        except OSError as error:
            log.debug("a program's connection: %s", error)
        finally:
            client.close()
            with self._changed:
                self._clients -= 1
                self._changed.notify_all()

    def _hear(self, client: socket.socket) -> bytes:
        data, ancillary, _, _ = client.recvmsg(64, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        for _, _, raw in ancillary:
            for (fd,) in struct.iter_unpack("i", raw):
                self._begin(socket.socket(fileno=fd))  # a child's
        return data

    def _answer(self, client: socket.socket, data: bytes) -> None:
        if data == NEW:
            return
        try:
            wish, _, inode = QUESTION.unpack(data)
            word, fd = self._find(inode, wish, peer_of(client).pid)
        except (ShardedPcError, OSError, struct.error) as error:
            text = getattr(error, "strerror", None) or str(error)
            word, fd = ERROR + text.encode()[:400], -1
        try:
            socket.send_fds(client, [word], [fd] if fd >= 0 else [])
        finally:
            if fd >= 0:
                os.close(fd)

    def _find(self, inode: int, wish: bytes, pid: int) -> tuple[bytes, int]:
        path = _ram_file(inode)
        if path is None:
            return NONE, -1
        name = _receiver_of(path)
        if self._name not in (None, name):
            raise AttachError(
                f"{path} is RAM of the receiver {name!r}, this program a guest of --name "
                f"{self._name}"
            )
        if not _is_over(name) and wish == RECEIVER:
            sock = self._connect(name, path)
            if sock is not None:
                with contextlib.closing(sock):
                    fds.send(sock, protocol.attach(pid))
                    sock.setblocking(False)
                    return SERVED, sock.detach()
        return PLAIN if _is_over(name) else SERVED, os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def _connect(self, name: str, path: Path) -> socket.socket | None:
        """To the receiver, or who takes its place in time; None once all is here.  AttachError."""
        deadline = time.monotonic() + self._seconds
        while True:
            where = [self._attach] if self._attach else _sockets(name, path)
            for each in where:
                if (sock := self._try(each)) is not None:
                    return sock
            if _is_over(name):
                return None
            if time.monotonic() > deadline:
                raise AttachError(
                    f"nobody listens for guests of {name!r} at {' or '.join(map(str, where))}: say "
                    f"where with --attach, or take a dead receiver up with --resume {name}"
                )
            time.sleep(AGAIN_SECONDS)

    def _try(self, path: str | Path) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            return None
        if self._is_trusted(peer := peer_of(sock)):
            return sock
        sock.close()
        raise AttachError(
            f"who listens at {path} (process {peer.pid}) belongs to uid {peer.uid}: see who made "
            f"that socket; if it is the receiver, `sharded-pc guest --user {peer.uid}`"
        )


def _ram_file(inode: int) -> Path | None:
    """A receiver's file of RAM, by its inode."""
    for entry in os.scandir(ROOT):
        if entry.inode() == inode and _receiver_of(Path(entry.path)) is not None:
            return Path(entry.path)
    return None


def _receiver_of(path: Path) -> str | None:
    name, dot, _ = path.name.partition(".")
    is_ram = dot and is_name(name) and (ROOT / f"{name}{CONTROL}").exists()
    return name if is_ram else None


def _is_over(name: str) -> bool:
    """Every page of its RAM has arrived."""
    try:
        segment = Segment.open(f"/{name}{CONTROL}")
    except FileNotFoundError:
        return False
    try:
        control = Control(segment.map)
        try:
            return control.is_valid() and control.status is MigrationStatus.COMPLETED
        finally:
            control.release()
    finally:
        segment.close()


def _sockets(name: str, ram: Path) -> Sequence[Path]:
    """Where a receiver of the RAM's owner listens for guests."""
    uid = ram.stat().st_uid
    folders = [*runtime_folder.places(name), *runtime_folder.places_of(uid, name)]
    return [folder / runtime_folder.ATTACH for folder in dict.fromkeys(folders)]


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def _wait_end(pidfd: int) -> None:
    select.select([pidfd], [], [])


@contextlib.contextmanager
def beside(
    *, name: str | None, attach: str | None, user: int | None, seconds: float
) -> Iterator[str]:
    """A broker beside this process, which becomes the program: the name of its socket."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(b"")  # the kernel gives an abstract name that nobody else has (unix(7))
    listener.listen()
    ours = os.pidfd_open(os.getpid())
    middle = os.fork()
    if middle == 0:
        # Twice, so that the program does not find a child that it has not made.
        if os.fork() == 0:
            _become(Broker(listener, ours, name=name, attach=attach, user=user, seconds=seconds),
                    {listener.fileno(), ours})  # fmt: skip
        os._exit(0)
    os.waitpid(middle, 0)
    where = listener.getsockname()
    listener.close()
    os.close(ours)
    yield os.fsdecode(where[1:])


def _become(broker: Broker, kept: set[int]) -> None:
    """Never returns.  What the program was given by its parent is not ours: a socket that we kept
    open would be heard for ever."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        bounds = [2, *sorted(kept), os.sysconf("SC_OPEN_MAX")]
        for low, high in itertools.pairwise(bounds):
            os.closerange(low + 1, high)
        broker.serve()
        code = 0
    except Exception:
        log.exception("the process beside a guest")
    finally:
        os._exit(code)
