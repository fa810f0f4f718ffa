"""Clients of the attach socket that say what they should not, and what they are told."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import socket
from collections.abc import Callable

from sharded_pc.attach import protocol
from sharded_pc.native.core import ffi
from sharded_pc.native.uffd import Uffd
from sharded_pc.transport import fds
from tests.synthetic import BLOCKS, WAIT_S

SHARDS = 2
"""Of the receivers they talk to."""


class Client:
    """A client of the attach socket that says what it likes.  Closes all that it was given."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(path)
        self._inbox = fds.Inbox()
        self._maps: list[mmap.mmap] = []
        self._given: list[int] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self._inbox.close()
        for fd in self._given:
            os.close(fd)

    def raw(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused already
            self.sock.sendall(data)

    def say(self, message: object, rights: list[int] = ()) -> None:
        fds.send(self.sock, message, rights)

    def answer(self) -> object | None:
        with contextlib.suppress(ConnectionResetError):
            return fds.receive_message(self.sock, self._inbox)

    def error(self) -> str | None:
        """The receiver's last word, behind which it closes."""
        message = self.answer()
        assert self.answer() is None, "the socket is still open"
        return message and message["error"]["desc"]

    def geometry(self) -> None:
        """Its first two steps, as they should be."""
        self.say(protocol.attach())
        assert "geometry" in self.answer()

    def map(self, fd: int = -1) -> int:
        """Where it has mapped block 0 of the RAM, or memory of its own (-1) of that size."""
        self._maps.append(mmap.mmap(fd, BLOCKS[0].size))
        with ffi.from_buffer(self._maps[-1]) as buffer:
            return int(ffi.cast("uintptr_t", buffer))

    def give(self, fd: int) -> int:
        self._given.append(fd)
        return fd

    def uffds(self, count: int = SHARDS) -> list[int]:
        return [self.give(Uffd.open().fd) for _ in range(count)]

    def map_ram(self) -> int:
        self.geometry()
        return self.map(self._inbox.fds[0])

    def hand_over(self, addresses: object, rights: list[int]) -> None:
        self.say({"mappings": {"addresses": addresses}}, rights)


def greeting(message: object) -> Callable[[Client], None]:
    raw = message if isinstance(message, bytes) else json.dumps(message).encode()
    return lambda client: client.raw(raw)


def attach_with(**changes: object) -> Callable[[Client], None]:
    return greeting({"attach": {"version": 1, "modes": ["missing"], **changes}})


def flood(client: Client) -> None:
    """More descriptors than one message may bring, in two."""
    for _ in range(2):
        socket.send_fds(client.sock, [b"["], [client.sock.fileno()] * fds.MAX_FDS)


def early(client: Client) -> None:
    """A good greeting with a descriptor, which would have to be held until a source comes."""
    client.say(protocol.attach(), [client.sock.fileno()])


Table = dict[str, tuple[Callable[[Client], None], str]]
GREETINGS: Table = {
    "rubbish": (greeting(b"\xff\0rubbish"), "not JSON"),
    "nested": (greeting(b"[" * 60_000), "nested too deeply"),
    "without end": (greeting(b'["' + b"x" * (1 << 20)), "more than 262144 bytes"),
    "a huge number": (greeting(b"[" + b"9" * 6000 + b"]"), "4300 digits"),
    "a number": (greeting(b"1 "), "expected an object or an array"),
    "an empty array": (greeting([]), r"got \[\]"),
    "null": (greeting({"attach": None}), "expected {'attach'"),
    "another step": (greeting(protocol.mappings({})), "expected {'attach'"),
    "version 2": (attach_with(version=2), "attach version 2, expected 1"),
    "no version": (attach_with(version=None), "attach version None, expected 1"),
    "no modes": (attach_with(modes=[]), r"attach modes \[\], expected a list with 'missing'"),
    "no process": (attach_with(pid=0), "attach for process 0: that is no number of one"),
    "unknown modes": (attach_with(modes=["minor", ["x"]]), "attach modes"),
    "modes that are none": (attach_with(modes="missing"), "attach modes 'missing'"),
    "an early descriptor": (early, "1 descriptors came before they were asked for"),
    "too many descriptors": (flood, "more descriptors than this process can take"),
}


def address(*values: object) -> Callable[[Client], None]:
    """Claims that the blocks are mapped at these addresses."""
    names = [block.name for block in BLOCKS]

    def speak(client: Client) -> None:
        client.geometry()
        client.hand_over(dict(zip(names, values, strict=False)), client.uffds())

    return speak


def descriptors(make: Callable[[Client], list[int]]) -> Callable[[Client], None]:
    """Maps the RAM and hands these over instead of one userfaultfd for each shard."""
    return lambda c: c.hand_over({"pc.ram": c.map_ram()}, make(c))


def other_memory(client: Client) -> None:
    address(client.map())(client)


def unmapped(client: Client) -> None:
    """An address where it had the RAM."""
    at = client.map_ram()
    client._maps.pop().close()
    client.hand_over({"pc.ram": at}, client.uffds())


def files(*paths: str) -> Callable[[Client], list[int]]:
    return lambda c: [c.give(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) for path in paths]


def after_geometry(message: object) -> Callable[[Client], None]:
    def say(client: Client) -> None:
        client.geometry()
        greeting(message)(client)

    return say


HANDOVERS: Table = {
    "rubbish": (after_geometry(b"{]"), "not JSON"),
    "another step": (after_geometry(protocol.attach()), "expected {'mappings'"),
    "no addresses": (after_geometry({"mappings": {"addresses": [1]}}), "without addresses"),
    "an unknown block": (after_geometry(protocol.mappings({"\ud800": 4096})), "unknown block"),
    **{
        f"address {value!r}": (address(value), "'pc.ram' cannot be mapped at address")
        for value in (
            4097,
            0,
            -4096,
            True,
            4096.0,
            "4096",
            None,
            [],
            1 << 64,
            (1 << 64) - 4096,
            1 << 99,
        )
    },
    "overlap": (address(1 << 30, (1 << 30) + 4096), "two blocks are mapped at address 0x40001000"),
    "unmapped": (unmapped, "is not where the guest has .*pc.ram mapped"),
    "other memory": (other_memory, "is not where the guest has .*pc.ram mapped"),
    "a page of the kernel": (address(0xFFFF800000000000), "is not where the guest has"),
    "no descriptors": (descriptors(lambda c: []), "0 userfaultfds handed over, expected one for"),
    "too few": (descriptors(lambda c: c.uffds(1)), "1 userfaultfds handed over"),
    "too many": (descriptors(lambda c: c.uffds(3)), "3 userfaultfds handed over"),
    "253": (descriptors(lambda c: c.uffds(1) * 253), "253 userfaultfds handed over"),
    "files": (descriptors(files("/dev/null", "/")), "is /dev/null, expected a userfaultfd"),
}


def memfds(client: Client) -> list[int]:
    return [client.give(os.memfd_create("userfaultfd")) for _ in range(SHARDS)]


def without_handshake(client: Client) -> list[int]:
    """userfaultfd(2) alone; the kernel's UFFDIO_API has not been asked."""
    call = ctypes.CDLL(None).syscall
    return [client.give(call(323, os.O_CLOEXEC | 1)) for _ in range(SHARDS)]


HANDOVERS |= {
    "memory with that name": (
        descriptors(memfds),
        "is /memfd:userfaultfd .*, expected a userfaultfd",
    ),
    "no handshake": (descriptors(without_handshake), "cannot be registered"),
}
SILENCES = {
    "nothing": greeting(b""),
    "half a greeting": greeting(b'{"attach": {"version": 1, "mo'),
    "after the geometry": after_geometry(b""),
    "half a hand-over": after_geometry(b'{"mappings": {"addr'),
}
