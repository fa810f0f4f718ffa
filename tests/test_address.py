"""QEMU's grammar of migration addresses: what is read, written and refused."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_pc.address import (
    GRAMMAR,
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    KeepAlive,
    TcpAddress,
    UnixAddress,
    parse,
)
from sharded_pc.errors import UsageError

GOOD = (
    ("tcp:127.0.0.1:4444", TcpAddress("127.0.0.1", 4444)),
    ("tcp::0", TcpAddress("", 0)),
    ("tcp:host.example:65535", TcpAddress("host.example", 65535)),
    ("tcp:[::1]:4444", TcpAddress("::1", 4444)),
    ("tcp:[fe80::1%eth0]:1", TcpAddress("fe80::1%eth0", 1)),
    ("tcp:a:1,keep-alive", TcpAddress("a", 1)),
    ("tcp:a:1,keep-alive=on", TcpAddress("a", 1)),
    ("tcp:a:1,keep-alive=off", TcpAddress("a", 1, KeepAlive(on=False))),
    (
        "tcp:a:1,keep-alive-idle=5,keep-alive-interval=2,keep-alive-count=4",
        TcpAddress("a", 1, KeepAlive(True, 5, 2, 4)),
    ),
    ("unix:/tmp/a b:c", UnixAddress("/tmp/a b:c")),
    ("unix:" + "x" * 107, UnixAddress("x" * 107)),
    ("unix:/tmp/\udcff", UnixAddress("/tmp/\udcff")),
    ("fd:0", FdAddress(0)),
    ("fd:17", FdAddress(17)),
    ("exec:nc -l 4444 | cat", ExecAddress("nc -l 4444 | cat")),
    ("file:/tmp/stream", FileAddress("/tmp/stream")),
    ("file:a,b,offset=4096", FileAddress("a,b", 4096)),
    ("file:/tmp/stream,offset=0x1000", FileAddress("/tmp/stream", 4096)),
    ("file:/tmp/stream,offset=0x7fffffffffffffff", FileAddress("/tmp/stream", (1 << 63) - 1)),
)
NO_TCP = "expected HOST:PORT, as in tcp:0.0.0.0:4444"
NO_FD = "expected the number of an inherited descriptor"
BAD = (
    ("", GRAMMAR),
    ("tcp", GRAMMAR),
    ("rdma:host:1", GRAMMAR),
    ("/tmp/socket", GRAMMAR),
    ("TCP:host:1", GRAMMAR),
    ("tcp:", NO_TCP),
    ("tcp:4444", NO_TCP),
    ("tcp:host:", NO_TCP),
    ("tcp:host:65536", NO_TCP),
    ("tcp:host:-1", NO_TCP),
    ("tcp:host: 1", NO_TCP),
    ("tcp:host:\u00b2", NO_TCP),
    ("tcp:host:\u0664", NO_TCP),
    ("tcp:host:" + "1" * 5000, NO_TCP),
    ("tcp:host:1,ipv4=on", "option 'ipv4=on' of a tcp address: expected one of keep-alive, "),
    ("tcp:host:1,keep-alive=yes", "keep-alive=on, keep-alive=off, keep-alive-idle=N"),
    ("tcp:host:1,keep-alive-count=0", "option 'keep-alive-count=0' of a tcp address"),
    ("tcp:host:1,keep-alive-idle=" + "9" * 5000, "of a tcp address"),
    ("tcp:host:1,", "option '' of a tcp address"),
    ("tcp:[[::1]]:4444", NO_TCP),
    ("tcp:[::1:4444", NO_TCP),
    ("tcp:[a]b:4444", NO_TCP),
    ("tcp:::1:4444", "put the IPv6 host in brackets, tcp:[::1]:4444"),
    ("unix:", "expected unix:PATH"),
    ("unix:" + "x" * 108, "at most 107 bytes"),
    ("unix:" + "\u00e9" * 54, "at most 107 bytes"),
    ("fd:", NO_FD),
    ("fd:-1", NO_FD),
    ("fd:stdin", NO_FD),
    ("fd:\u00b3", NO_FD),
    ("fd:" + "9" * 5000, NO_FD),
    ("exec:", "expected exec:COMMAND"),
    ("exec:  ", "expected exec:COMMAND"),
    ("file:", "expected file:PATH"),
    ("file:,offset=1", "expected file:PATH"),
    ("file:a,offset=", "expected a number of bytes"),
    ("file:a,offset=b", "expected a number of bytes"),
    ("file:a,offset=-1", "expected a number of bytes"),
    ("file:a,offset=1,offset=2", "expected a number of bytes"),
    ("file:a,offset=0x8000000000000000", "expected a number of bytes"),
    ("file:a,offset=0x" + "f" * 5000, "expected a number of bytes"),
)


@pytest.mark.parametrize(("text", "address"), GOOD)
def test_good(text: str, address: Address) -> None:
    assert parse(text) == address
    told = address
    if isinstance(address, TcpAddress):  # how we watch a source is not the source's business
        told = dataclasses.replace(address, keep_alive=KeepAlive())
    assert parse(str(address)) == told


@pytest.mark.parametrize(("text", "expected"), BAD, ids=lambda text: text[:30] or "empty")
def test_bad(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert expected in str(caught.value)


PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
ADDRESSES = st.one_of(
    st.builds(TcpAddress, st.from_regex(r"[a-z0-9.-]*|[0-9a-f:]+", fullmatch=True),
              st.integers(0, 65535)),
    st.builds(UnixAddress, PATHS.filter(lambda path: len(path.encode()) <= 107)),
    st.builds(FdAddress, st.integers(0, 1 << 20)),
    st.builds(ExecAddress, PATHS.filter(str.strip)),
    st.builds(FileAddress, PATHS.filter(lambda path: ",offset=" not in path),
              st.integers(0, 1 << 62)),
)  # fmt: skip


@given(ADDRESSES)
def test_round_trip(address: Address) -> None:
    assert parse(str(address)) == address


@given(st.text() | st.from_regex(r"(tcp|unix|fd|exec|file):.*"))
def test_any_text_is_an_address_or_a_usage_error(text: str) -> None:
    try:
        address = parse(text)
    except UsageError:
        return
    if getattr(address, "keep_alive", KeepAlive()) == KeepAlive():
        assert parse(str(address)) == address
