"""Streams that are cut, wrong, illegal or random: one clear error, nothing left, no harm
(design §7, invariant 7).

Most run in this process (``LoneReceiver``: the real stream code, C core, shards and userfaultfds);
one of each kind goes through the command line.
"""

from __future__ import annotations

import os
import random
import re
import socket
import struct
from collections.abc import Callable

import pytest

from sharded_pc import shm
from sharded_pc.errors import (
    ConnectionLost,
    HostError,
    RemoteProtocolError,
    ShardedPcError,
    StreamEnded,
)
from sharded_pc.geometry import PAGE_BYTES, Placement, RamBlock
from sharded_pc.state import TRANSITIONS, Message, PostcopyState
from sharded_pc.wire import package
from sharded_pc.wire import writer as w
from sharded_pc.wire.constants import Cmd
from tests.bad_stream_cases import BAD
from tests.receiver import Receiver
from tests.synthetic import ChangingOracle, LoneReceiver, Receiving, missing_pages

pytestmark = pytest.mark.uffd

S, M = PostcopyState, Message
BLOCKS = (RamBlock("pc.ram", 16 * PAGE_BYTES), RamBlock("pc.bios", 4 * PAGE_BYTES))
ORACLE = ChangingOracle(BLOCKS, seed=5, dirty_share=0.6)
DATA = bytes(range(256)) * 16


# --- a good stream, in sections ---


def precopy_sections() -> list[bytes]:
    pages = [(block, range(ram.pages)) for block, ram in enumerate(BLOCKS)]
    return [w.ram_section(ORACLE.records(b, list(p), ORACLE.precopied(b))) for b, p in pages]


def discards() -> list[bytes]:
    ranges = [(page * PAGE_BYTES, PAGE_BYTES) for page in missing_pages(ORACLE, 0)]
    first, rest = ranges[:12], ranges[12:]
    bios = [(page * PAGE_BYTES, PAGE_BYTES) for page in missing_pages(ORACLE, 1)]
    return [w.discard("pc.ram", r) for r in (first, rest) if r] + [w.discard("pc.bios", bios)]


def postcopy_sections() -> list[bytes]:
    """Batches of four pages, data and zeros."""
    sections = []
    for block in range(len(BLOCKS)):
        pages = missing_pages(ORACLE, block)
        for at in range(0, len(pages), 4):
            records = ORACLE.records(block, pages[at : at + 4], ORACLE.final(block))
            sections.append(w.ram_section(records))
    return sections


ADVISED = [
    w.header(), w.configuration("synthetic"), w.open_return_path(), w.ping(1), w.postcopy_advise(),
    w.ram_setup(BLOCKS), *precopy_sections(),
]  # fmt: skip
SWITCHED = [*ADVISED, *discards(), w.ping(2), w.packaged(b"devices")]
SECTIONS = [*SWITCHED, w.ping(4), *postcopy_sections(), w.ram_section(b"", last=True), w.eof()]
GOOD = b"".join(SECTIONS)
LISTENING_AT = len(b"".join(SWITCHED))
"""From here on a broken wire is a lost connection."""


@pytest.fixture
def run(new_name: Callable[[], str]) -> Callable[..., ShardedPcError | None]:
    """Feeds a stream to a receiver of its own, which must come out of it unharmed."""

    def run_one(stream: bytes, shards: int = 2) -> ShardedPcError | None:
        errors = [run_placed(stream, shards, placement) for placement in Placement]
        assert len({re.sub(r"\d+", "N", str(error)) for error in errors}) == 1, errors
        return errors[0]

    def run_placed(stream: bytes, shards: int, placement: Placement) -> ShardedPcError | None:
        receiver = LoneReceiver(new_name(), shards, placement)
        try:
            error = receiver.run(stream)
            check_unharmed(receiver)
        finally:
            receiver.close()
        if error is None:
            assert receiver.statuses[-1].value == "completed"
        return error

    return run_one


def check_unharmed(receiver: LoneReceiver) -> None:
    """Its segments have the sizes they were made with, and no shard broke."""
    memory = receiver.memory
    blocks = memory.geometry.blocks if memory.geometry else ()
    sizes = {shm.block_segment_name(memory.name, b.name).lstrip("/"): b.size for b in blocks}
    ours = [name for name in os.listdir(shm.ROOT) if name.startswith(f"{memory.name}.")]
    assert {name: (shm.ROOT / name).stat().st_size for name in ours} == sizes
    for segment in (memory.pool, memory._control_segment):
        assert os.fstat(segment.fd).st_size == segment.size
    assert receiver.broken == []


@pytest.mark.parametrize("placement", list(Placement))
def test_the_good_stream_is_good(new_name, placement):
    """What the cases below break: received whole, every byte right."""
    receiver = LoneReceiver(new_name(), placement=placement)
    try:
        assert receiver.run(GOOD) is None
        for index, block in enumerate(BLOCKS):
            content = os.pread(receiver.memory.blocks[index].fd, block.size, 0)
            assert ORACLE.first_wrong(index, content, ORACLE.final(index)) is None
        assert receiver.devices == b"devices"
    finally:
        receiver.close()


# --- cut ---


def cuts() -> list[int]:
    """Around every boundary between sections, and some in between."""
    ends = [len(b"".join(SECTIONS[:n])) for n in range(len(SECTIONS))]
    around = {at + d for at in ends for d in (-1, 0, 1)} | {at + 9 for at in ends}
    dice = random.Random(1)
    around |= {dice.randrange(len(GOOD)) for _ in range(15)}
    return sorted(at for at in around if 0 <= at < len(GOOD))


@pytest.mark.parametrize("part", range(4))
def test_a_cut_stream(run, part):
    """Before LISTENING the source broke the protocol (or gave up); from then on it still has pages
    and the connection is lost.  Offset and state are named."""
    for cut in cuts()[part::4]:
        error = run(GOOD[:cut])
        late = cut >= LISTENING_AT
        assert type(error) is (ConnectionLost if late else StreamEnded), (cut, error)
        assert error.exit_code == (5 if late else 4)
        at, state = offset_of(error), state_of(error)
        assert cut - PAGE_BYTES - 16 <= at <= cut, (cut, error)
        assert (state in ("LISTENING", "RUNNING")) is late, (cut, error)


def offset_of(error: ShardedPcError) -> int:
    return int(str(error).partition("stream offset ")[2].split()[0])


def state_of(error: ShardedPcError) -> str:
    return str(error).partition("in postcopy state ")[2].split()[0].rstrip(":")


# --- illegal in its state ---

READY = w.header() + w.configuration("m") + w.open_return_path() + w.ram_setup(BLOCKS)
DISCARD = w.discard("pc.ram", [(0, PAGE_BYTES)])
PREFIX = {
    S.NONE: READY,
    S.ADVISE: (advised := READY + w.postcopy_advise()),
    S.DISCARD: (discarding := advised + DISCARD),
    S.RUNNING: discarding + w.packaged(b"devices"),
}
"""A stream that leads to each state; LISTENING only lasts while a package is read."""
END = w.ram_section(b"", last=True)
EXPRESSION = {
    M.OPEN_RETURN_PATH: w.open_return_path(),
    M.PING: w.ping(1),
    M.POSTCOPY_ADVISE: w.postcopy_advise(),
    M.RAM_SETUP: w.ram_setup(BLOCKS),
    M.RAM_PRECOPY: w.ram_section(b""),
    M.RAM_END: END,
    M.DEVICES: w.full_section(3, "timer", b"ticks") + w.eof() + w.vmdescription({"a": 1}),
    M.VMDESCRIPTION: w.vmdescription({"a": 1}),
    M.SWITCHOVER_START: w.command(Cmd.SWITCHOVER_START),
    M.POSTCOPY_RAM_DISCARD: DISCARD,
    M.PACKAGED: w.packaged(b"devices"),
    M.POSTCOPY_LISTEN: package.LISTEN,
    M.POSTCOPY_RUN: package.RUN,
    M.EOF: w.eof(),
}
"""How a stream says each message; device state in a package has no words of its own."""


@pytest.mark.parametrize("state", PREFIX, ids=lambda state: state.name)
def test_whatever_is_not_in_the_table_is_refused(run, state):
    """Every (state, message) that a stream can express: those that are not in TRANSITIONS are a
    protocol error at that message, naming the state; those that are, are not."""
    for message, said in EXPRESSION.items():
        prefix = PREFIX[state]
        if message is M.DEVICES and state is S.RUNNING:
            prefix += END  # before it a device section cannot even be read
        error = run(prefix + said)
        if (state, message) in TRANSITIONS:
            assert "not legal" not in str(error), (message, error)
            continue
        assert type(error) is RemoteProtocolError, (message, error)
        assert (error.state, error.exit_code) == (state.name, 4), (message, error)
        assert error.offset >= len(prefix), (message, error)


# --- wrong ---


def advise(*numbers: int) -> bytes:
    return w.command(Cmd.POSTCOPY_ADVISE, struct.pack(f">{len(numbers)}Q", *numbers))


def part(records: bytes) -> bytes:
    return w.ram_section(records)


def blob(content: bytes, length: int | None = None) -> bytes:
    size = len(content) if length is None else length
    return w.command(Cmd.PACKAGED, struct.pack(">I", size)) + content


DISCARDING, RUNNING = PREFIX[S.DISCARD], PREFIX[S.RUNNING]
MAX = 1 << 64
BARE = w.header() + w.configuration("m") + w.postcopy_advise()
"""Advised, but without return path and block list."""
NEW = READY + part(w.zero_page("pc.ram", 0, 0))
DISCARDS = {
    "unaligned": (
        "pc.ram",
        1,
        PAGE_BYTES,
        "0x1 in block 'pc.ram' is not whole",
    ),
    "half a page": ("pc.ram", 0, 2048, "is not whole 4096-byte pages"),
    "of nothing": ("pc.ram", 0, 0, "discard of 0x0 bytes at 0x0"),
    "behind the end": (
        "pc.ram",
        16 * PAGE_BYTES,
        PAGE_BYTES,
        "outside block 'pc.ram' of 0x10000",
    ),
    "over the end": ("pc.bios", 0, 5 * PAGE_BYTES, "outside block 'pc.bios' of 0x4000 bytes"),
    "huge start": ("pc.ram", MAX - PAGE_BYTES, PAGE_BYTES, "outside block 'pc.ram'"),
    "huge length": ("pc.ram", 0, MAX - PAGE_BYTES, "outside block 'pc.ram'"),
    "sum of 2^64": ("pc.ram", PAGE_BYTES, MAX - PAGE_BYTES, "outside block 'pc.ram'"),
    "unknown block": ("pc.rom", 0, PAGE_BYTES, "discard in unknown block 'pc.rom'"),
}
WRONG: dict[str, tuple[bytes, bytes, str, int]] = {
    # name: (prefix, wrong bytes, error, offset of the error within them)
    **{
        f"discard {name}": (DISCARDING, w.discard(block, [(0, PAGE_BYTES), (at, size)]), error, 0)
        for name, (block, at, size, error) in DISCARDS.items()
    },
    "discard before blocks": (BARE, DISCARD, "POSTCOPY_RAM_DISCARD before the block list", 0),
    "package before blocks": (BARE, w.packaged(b""), "PACKAGED before the block list", 0),
    "PING without a way back": (BARE, w.ping(1), "PING before OPEN_RETURN_PATH", 0),
    "EOF before RAM": (BARE, w.eof(), "the stream ends before any RAM", 0),
    "CONTINUE without a block": (READY, part(w.page(None, 0, DATA)), "continues a block, but", 5),
    "fill byte": (NEW, part(w.zero_page(None, 0, 7)), "with fill byte 0x7, expected 0", 5),
    "unknown block": (NEW, part(w.page("pc.rom", 0, DATA)), "for unknown block 'pc.rom'", 5),
    "unknown block in postcopy": (RUNNING, part(w.zero_page("x", 0)), "unknown block 'x'", 5),
    "outside": (NEW, part(w.page(None, 16 * PAGE_BYTES, DATA)), "outside block 'pc.ram'", 5),
    "outside in postcopy": (
        RUNNING, part(w.page("pc.bios", 0, DATA) + w.page(None, 4 * PAGE_BYTES, DATA)),
        "0x4000 outside block 'pc.bios'", 5 + 16 + PAGE_BYTES,
    ),
    "far outside": (RUNNING, part(w.zero_page("pc.ram", MAX - PAGE_BYTES)), "outside block", 5),
    "second block list": (NEW, part(struct.pack(">Q", 0x1004)), "a second block list", 5),
    "no footer": (RUNNING, part(b"")[:-5] + b"\1" * 5, "0x01, expected a footer", 0),
    "footer of another": (NEW, part(b"")[:-1] + b"\7", "footer of section 7, expected 2", 0),
    "unknown section": (RUNNING, b"\x55", "unknown section type 0x55", 0),
    "unknown command": (DISCARDING, w.command(99, b"abc"), "unknown command 0x63 of", 0),
    "wrong length": (RUNNING, w.command(Cmd.PING, b"a"), "PING of 1 bytes, expected 4", 0),
    "package cut": (DISCARDING, blob(package.LISTEN, 99), "94 bytes of 99 missing", 14),
    "package without LISTEN": (DISCARDING, blob(b"devices"), "expected POSTCOPY_LISTEN", 0),
    "package without RUN": (DISCARDING, blob(package.LISTEN + b"dev"), "expected POSTCOPY_RUN", 0),
    "package too long": (
        DISCARDING, blob(package.LISTEN + package.RUN, 11) + w.ping(4), "expected POSTCOPY_RUN", 0,
    ),
    "package of 4 GiB": (DISCARDING, blob(b"", 0xFFFFFFFF), "package of 4294967295", 0),
    "a device": (READY, w.full_section(3, "slirp", b""), "device 'slirp' .* cannot be skipped", 0),
    "pages of 2 GiB": (READY, advise(0x80001000, PAGE_BYTES), "page sizes 0x80001000, expected", 0),
    "pages of 1 KiB": (READY, advise(0x1400, PAGE_BYTES), "page sizes 0x1400, expected 0x1000", 0),
    "other target pages": (READY, advise(PAGE_BYTES, 8192), "target pages of 8192 bytes", 0),
    "only dirty bitmaps": (READY, advise(), "dirty bitmaps only: turn the source's", 0),
    "pages never sent": (RUNNING + END, w.eof(), "ended with 20 pages never sent", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_message(run, case):
    """One error that says what, at which stream offset, in which state."""
    prefix, wrong, expected, at = WRONG[case]
    error = run(prefix + wrong)
    assert isinstance(error, RemoteProtocolError) and error.exit_code == 4, error
    with pytest.raises(RemoteProtocolError, match=expected):
        raise error
    assert error.offset == len(prefix) + at
    states = {value: state.name for state, value in PREFIX.items()}
    states |= {BARE: "ADVISE", NEW: "NONE", RUNNING + END: "RUNNING"}
    assert str(error).endswith(f" in postcopy state {states[prefix]}")


def test_what_the_parser_refuses_the_receiver_refuses(run):
    """The sans-I/O tests' bad streams, on the real thing: the same error at the same offset, or
    the state table's if it comes first."""
    for case in BAD:
        error = run(case.stream, shards=1)
        assert type(error) is RemoteProtocolError, (case.name, error)
        if "is not legal here" not in error.what:
            assert (error.what, error.offset) == (case.error, case.at), case.name


def test_ram_that_cannot_fit(run):
    """Blocks beyond this host's memory: its error, with both numbers and a remedy."""
    for size in (1 << 43, 1 << 46):
        error = run(w.header() + w.configuration("m") + w.ram_setup([RamBlock("pc.ram", size)]))
        assert type(error) is HostError and error.exit_code == 3
        with pytest.raises(HostError, match=rf"{size} bytes \(.*\) .* needed, \d+ bytes .*; \w+"):
            raise error


def test_pings_that_nobody_reads_the_answers_of(tmp_path, unique_name):
    """A source that asks and never listens is refused; nothing grows without bound."""
    with Receiving(tmp_path, unique_name, workers=1) as receiver:
        receiver.sock.sendall(READY)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                receiver.sock.sendall(w.ping(1) * 200)
        with pytest.raises(RemoteProtocolError, match="the source does not read its return path"):
            receiver.finish()


# --- random ---


def mutated(dice: random.Random) -> bytes:
    """The good stream with one to four random changes, some of them in its small sections."""
    sections = list(SECTIONS)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(sections))
        sections[at] = dice.choice(CHANGES)(dice, sections[at])
        if dice.random() < 0.15:
            sections.insert(dice.randrange(len(sections)), dice.choice(SECTIONS))
        if dice.random() < 0.1:
            del sections[dice.randrange(len(sections))]
    return b"".join(sections)


def flip(dice: random.Random, raw: bytes) -> bytes:
    out = bytearray(raw)
    for _ in range(dice.randint(1, 3)):
        out[place(dice, raw)] ^= 1 << dice.randrange(8)
    return bytes(out)


def cut(dice: random.Random, raw: bytes) -> bytes:
    return raw[: place(dice, raw)]


def repeat(dice: random.Random, raw: bytes) -> bytes:
    start = place(dice, raw)
    return raw[:start] + raw[start : start + dice.randint(1, 64)] * 2 + raw[start:]


def insert(dice: random.Random, raw: bytes) -> bytes:
    start = place(dice, raw)
    return raw[:start] + dice.randbytes(dice.randint(1, 9)) + raw[start:]


def place(dice: random.Random, raw: bytes) -> int:
    """Rather in the head of a section than in its pages."""
    return dice.randrange(min(len(raw), 40) if dice.random() < 0.7 else len(raw))


CHANGES = (flip, flip, cut, repeat, insert)


@pytest.mark.parametrize("part", range(4))
def test_mutated_streams(run, part):
    """A hundred seeded mutations: each ends in time, with completion or an error that says who is
    to blame; no shard breaks and nothing is written outside."""
    for seed in range(part, 100, 4):
        stream = mutated(random.Random(seed))
        error = run(stream, shards=1 + seed % 2)
        assert error is None or error.exit_code in (3, 4, 5), (seed, error)


# --- through the command line ---

CLI = {
    "no stream": (b"GET / HTTP/1.1\r\n", 4, "not a migration stream: magic"),
    "cut in precopy": (GOOD[: len(READY) + 30], 4, "source closed the stream"),
    "cut in postcopy": (GOOD[: LISTENING_AT + 99], 5, "connection to the source"),
    "illegal": (DISCARDING + w.ram_section(b""), 4, "PART section is not legal"),
    "pages never sent": (RUNNING + END + w.eof(), 5, "20 pages never sent"),
    "too big": (
        w.header() + w.ram_setup([RamBlock("pc.ram", 1 << 45)]), 3, "35184372088832 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLI)
def test_through_the_command_line(tmp_path, unique_name, case):
    """Exit code, one line on stderr, one JSON object with the same words, and nothing left."""
    stream, code, text = CLI[case]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = theirs.fileno()
        options = {"keep": False, "pass_fds": [fd], "control": True}
        with Receiver(tmp_path, unique_name, f"fd:{fd}", **options) as receiver:
            theirs.close()
            ours.sendall(stream)
            ours.shutdown(socket.SHUT_WR)
            outcome = receiver.give_up() if code == 5 else receiver.finish()
    assert outcome.exit_code == code
    assert (outcome.info["status"], text in outcome.info["error-desc"]) == ("failed", True)
    assert outcome.errors == [f"sharded-pc: {outcome.info['error-desc']}"]
    assert ("WARNING: paused: " in outcome.stderr) == (code == 5)
