"""QEMU's grammar of migration URIs (qemu(1), -incoming)."""

from __future__ import annotations

import dataclasses
import ipaddress

from sharded_pc.errors import UsageError

MAX_PATH_BYTES = 107
"""Of a Unix socket: sun_path has 108, with the NUL (unix(7))."""
GRAMMAR = (
    "tcp:HOST:PORT[,keep-alive=on|off], unix:PATH, fd:N, exec:COMMAND or file:PATH[,offset=BYTES]"
)
MOST_OFFSET = (1 << 63) - 1
"""A file's position is signed (off_t)."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeepAlive:
    """Whether and how the kernel asks a quiet peer if it still lives; None: the receiver's own
    choice (transport/liveness.py).  Seconds."""

    on: bool = True
    idle: int | None = None
    interval: int | None = None
    count: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TcpAddress:
    """port 0 lets the system choose; IPv6 hosts stand in brackets."""

    host: str
    port: int
    keep_alive: KeepAlive = KeepAlive()

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@dataclasses.dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclasses.dataclass(frozen=True, slots=True)
class FdAddress:
    """An inherited descriptor: a connected socket, or the reading end of a pipe."""

    fd: int

    def __str__(self) -> str:
        return f"fd:{self.fd}"


@dataclasses.dataclass(frozen=True, slots=True)
class ExecAddress:
    """A shell command whose standard output is the stream and whose standard input the way back."""

    command: str

    def __str__(self) -> str:
        return f"exec:{self.command}"


@dataclasses.dataclass(frozen=True, slots=True)
class FileAddress:
    """A file that holds a stream; there is no way back."""

    path: str
    offset: int = 0

    def __str__(self) -> str:
        return f"file:{self.path}" + (f",offset={self.offset}" if self.offset else "")


@dataclasses.dataclass(frozen=True, slots=True)
class DeferAddress:
    """Told later, by migrate-incoming."""

    def __str__(self) -> str:
        return "defer"


Address = TcpAddress | UnixAddress | FdAddress | ExecAddress | FileAddress | DeferAddress


def is_loopback(host: str) -> bool:
    """Whether a numeric address is reached from this host only."""
    address = ipaddress.ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _is_number(text: str, most_digits: int) -> bool:
    """Plain ASCII digits, few enough for what they count."""
    return text.isascii() and text.isdigit() and len(text) <= most_digits


def _tcp(text: str) -> TcpAddress:
    rest, *options = text.split(",")
    host, colon, port = rest.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    number = _is_number(port, 5) and int(port) <= 65535
    if not colon or not number or "[" in bare or "]" in bare:
        raise UsageError(f"tcp address {rest!r}: expected HOST:PORT, as in tcp:0.0.0.0:4444")
    if ":" in bare and bare == host:
        raise UsageError(
            f"tcp address {rest!r}: put the IPv6 host in brackets, tcp:[{host}]:{port}"
        )
    return TcpAddress(bare, int(port), _keep_alive(options))


_NUMBERS = {
    "keep-alive-idle": "idle",
    "keep-alive-interval": "interval",
    "keep-alive-count": "count",
}
"""Options of a tcp address since QEMU 10.1, each a positive number."""
_SWITCH = {"keep-alive": True, "keep-alive=on": True, "keep-alive=off": False}


def _keep_alive(options: list[str]) -> KeepAlive:
    """As far as QEMU's socket options (qapi/sockets.json, InetSocketAddress) are about a peer that
    vanishes."""
    on, numbers = True, {}
    for option in options:
        name, _, value = option.partition("=")
        if option in _SWITCH:
            on = _SWITCH[option]
        elif name in _NUMBERS and _is_number(value, 5) and int(value) > 0:
            numbers[_NUMBERS[name]] = int(value)
        else:
            known = ", ".join((*_SWITCH, *(f"{name}=N" for name in _NUMBERS)))
            raise UsageError(f"option {option!r} of a tcp address: expected one of {known}")
    return KeepAlive(on, **numbers)


def _unix(rest: str) -> UnixAddress:
    if not rest:
        raise UsageError("unix address without a path: expected unix:PATH")
    if len(rest.encode("utf-8", "surrogateescape")) > MAX_PATH_BYTES:
        raise UsageError(
            f"unix address {rest!r}: a socket's path has at most {MAX_PATH_BYTES} bytes"
        )
    return UnixAddress(rest)


def _fd(rest: str) -> FdAddress:
    if not _is_number(rest, 9):
        raise UsageError(f"fd address {rest!r}: expected the number of an inherited descriptor")
    return FdAddress(int(rest))


def _exec(rest: str) -> ExecAddress:
    if not rest.strip():
        raise UsageError("exec address without a command: expected exec:COMMAND")
    return ExecAddress(rest)


def _bytes(text: str) -> int:
    try:
        offset = int(text, 0)
    except ValueError:
        offset = -1
    if not 0 <= offset <= MOST_OFFSET:
        raise UsageError(f"file offset {text!r}: expected a number of bytes")
    return offset


def _file(rest: str) -> FileAddress:
    path, comma, option = rest.partition(",offset=")
    if not path:
        raise UsageError("file address without a path: expected file:PATH")
    return FileAddress(path, _bytes(option) if comma else 0)


_KINDS = {"tcp": _tcp, "unix": _unix, "fd": _fd, "exec": _exec, "file": _file}


def parse(text: str) -> Address:
    """`text` as one of the addresses above; UsageError names what was expected."""
    kind, colon, rest = text.partition(":")
    if text == "defer":
        return DeferAddress()
    if not colon or kind not in _KINDS:
        raise UsageError(f"address {text!r}: expected {GRAMMAR}")
    return _KINDS[kind](rest)
