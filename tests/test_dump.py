"""`sharded-pc dump`: every message is told with its place, and a stream up to where it breaks."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from sharded_pc import cli
from sharded_pc.dump import Walk, text, walk
from sharded_pc.geometry import RamBlock
from sharded_pc.native import records as native
from sharded_pc.testing.oracle import PageOracle
from sharded_pc.wire import multifd, resume
from sharded_pc.wire import writer as w
from sharded_pc.wire.constants import Cmd, RamFlag
from tests import bad_stream_cases, stream_cases
from tests.stream_cases import BLOCKS, CONFIGURATION, DATA, DESCRIPTION, SETUP

HEAD = w.header() + w.configuration("pc-i440fx-7.2")
READY = HEAD + SETUP
NAME = b"\6pc.ram"


def told(stream: bytes) -> tuple[list[dict], Walk]:
    """The messages stand one behind the other, a package's too."""
    found = Walk(io.BytesIO(stream))
    messages = list(found.messages())
    at = 0
    for message in messages:
        assert message["offset"] == at and message["size"] > 0
        at += message["size"]
    return messages, found


def whole(stream: bytes) -> list[dict]:
    messages, found = told(stream)
    assert found.error is None, found.error
    assert sum(message["size"] for message in messages) == len(stream) == found.size
    return messages


def record(offset: int, flags: int, content: bytes) -> bytes:
    return struct.pack(">Q", offset | flags) + content


@pytest.mark.parametrize("case", [*stream_cases.GOOD, *stream_cases.UNDESCRIBED], ids=str)
def test_what_a_receiver_takes_is_told(case) -> None:
    messages = whole(case.stream)
    assert messages[0]["type"] == "header" and messages[1]["machine"]


@pytest.mark.parametrize("case", bad_stream_cases.BAD, ids=str)
def test_what_a_receiver_refuses_is_told_up_to_there(case) -> None:
    messages, found = told(case.stream)
    assert found.error is None or found.error.offset is not None
    assert json.dumps(messages) and list(text.lines(messages)) is not None


def test_postcopy() -> None:
    messages = whole(stream_cases.POSTCOPY)
    commands = [message["command"] for message in messages if message["type"] == "command"]
    assert commands == [
        "open-return-path", "ping", "postcopy-advise", "switchover-start", "postcopy-ram-discard",
        "ping", "packaged", "postcopy-listen", "ping", "ping", "postcopy-run", "ping",
    ]  # fmt: skip
    inner = [message for message in messages if message.get("in-package")]
    assert [message["type"] for message in inner] == ["command", "section", *["command"] * 3]
    assert inner[1]["name"] == "timer" and inner[1]["opaque"] > 0
    assert [m["value"] for m in messages if m.get("command") == "ping"] == [1, 2, 3, 0x42, 4]
    (discard,) = (m for m in messages if m.get("command") == "postcopy-ram-discard")
    assert discard["ranges"] == [
        {"start": 0x1000, "length": 0x2000}, {"start": 0x8000, "length": 0x1000},
    ]  # fmt: skip


def test_configuration_and_its_subsections() -> None:
    names = b"\x0ax-colo-ish" + b"\x0amapped-ram"
    capabilities = b"configuration/capabilities"
    raw = bytes([5, len(capabilities)]) + capabilities + struct.pack(">II", 1, 2) + names
    messages = whole(CONFIGURATION + raw + w.eof())
    told_ = [message for message in messages if message["type"] == "subsection"]
    assert told_[0]["target-page-bits"] == 12
    assert told_[-1]["capabilities"] == ["x-colo-ish", "mapped-ram"]
    assert any("uuid" in message for message in told_)


def test_pages_are_counted_by_kind() -> None:
    packed = zlib.compress(DATA)
    section = w.ram_section(
        w.page("pc.ram", 0, DATA)
        + w.page(None, 4096, DATA)
        + w.zero_page(None, 8192)
        + w.page(None, 0xF000, DATA)
        + record(4096, RamFlag.XBZRLE | RamFlag.CONTINUE, b"\1\0\3abc")
        + record(0, RamFlag.XBZRLE, b"\x07pc.bios" + b"\1\0\3abc")
        + record(0, RamFlag.COMPRESS_PAGE, NAME + struct.pack(">I", len(packed)) + packed)
        + record(0, RamFlag.MULTIFD_FLUSH, b"")
        + record(0, RamFlag.HOOK, b"")
    )
    message = whole(READY + section + w.eof())[-2]
    assert message["ram"] == [
        {
            "block": "pc.ram",
            "normal": {"pages": 3, "runs": 2, "first": 0, "last": 0xF000},
            "duplicate": {"pages": 1, "runs": 1, "first": 8192, "last": 8192},
            "xbzrle": {"pages": 1, "runs": 1, "first": 4096, "last": 4096},
            "compressed": {"pages": 1, "runs": 1, "first": 0, "last": 0},
        },
        {"block": "pc.bios", "xbzrle": {"pages": 1, "runs": 1, "first": 0, "last": 0}},
    ]
    assert message["multifd-flush"] == 1 and message["rdma-hook"] == 1


def test_the_core_counts_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = PageOracle((RamBlock("pc.ram", 4 << 20),), seed=3, zero_share=0.4)
    order = array("Q", [*range(500, 900), *range(0, 300), 7, 9, 8])
    content = pages.records(0, order, pages.precopied(0))
    stream = HEAD + w.ram_setup(pages.blocks) + w.ram_section(content) + w.eof()
    by_core = whole(stream)
    monkeypatch.setattr(walk, "pass_records", lambda *_: 0)
    assert whole(stream) == by_core
    assert sum(by_core[-2]["ram"][0][kind]["pages"] for kind in ("normal", "duplicate")) == 703


def test_the_core_takes_whole_records_only() -> None:
    records = w.page(None, 0, DATA) + w.zero_page(None, 4096)
    for size in range(len(records) + 1):
        normal, zero = native.Passed(), native.Passed()
        passed = native.pass_records(records[:size], 8192, normal, zero)
        assert passed == (0 if size < 4104 else 4104 if size < 4113 else 4113)
        assert (normal.raw.pages, zero.raw.pages) == (passed >= 4104, passed == 4113)
    assert native.pass_records(records, 4096, native.Passed(), native.Passed()) == 4104
    filled = w.zero_page(None, 0, fill=1)
    assert native.pass_records(filled, 4096, native.Passed(), native.Passed()) == 0


def test_commands_nobody_obeys() -> None:
    colo = w.command(Cmd.ENABLE_COLO)
    new = w.command(99, b"new")
    messages = whole(READY + colo + new + w.ping(0x42) + w.eof())
    assert [m.get("command") for m in messages[3:6]] == ["enable-colo", "unknown", "ping"]
    assert messages[4]["number"] == 99 and messages[4]["length"] == 3
    _, found = told(READY + w.command(Cmd.PING, b"new"))
    assert str(found.error) == f"PING of 3 bytes, expected 4 at stream offset {len(READY)}"


def test_devices_are_found_by_their_footers() -> None:
    tricky = b"\x7e\0\0\0\3\xff" + bytes(70000) + b"\x7e\0\0\0"
    early = w.full_section(3, "virtio-mem-early", tricky)
    live = b"\1" + struct.pack(">I", 5) + b"\x0cdirty-bitmap" + struct.pack(">II", 0, 1)
    live += b"dirty" + b"\x7e" + struct.pack(">I", 5)
    more = b"\3" + struct.pack(">I", 5) + b"bits" + b"\x7e" + struct.pack(">I", 5)
    end = w.full_section(6, "cpu", tricky) + w.eof() + w.vmdescription(DESCRIPTION)
    messages = whole(HEAD + early + SETUP + live + more + w.ram_section(b"", last=True) + end)
    found = [(m["name"], m["kind"], m["opaque"]) for m in messages if "opaque" in m]
    size = len(tricky)
    assert found == [
        ("virtio-mem-early", "full", size), ("dirty-bitmap", "start", 5),
        ("dirty-bitmap", "end", 4), ("cpu", "full", size),
    ]  # fmt: skip
    assert messages[-1]["devices"] == [{"name": "timer"}]


@pytest.mark.parametrize("size", [0, 1, 17, 64, 65, 5000, 3 << 20])
def test_a_package_that_is_no_qemus(size: int) -> None:
    messages = whole(READY + w.packaged(b"\xaa" * size, (3, 0x42)) + w.eof())
    inner = [message for message in messages if message.get("in-package")]
    assert sum(message.get("opaque", 0) for message in inner) == size
    assert [m["command"] for m in inner if "command" in m] == [
        "postcopy-listen", "ping", "ping", "postcopy-run",
    ]  # fmt: skip


def test_blocks_with_what_stands_beside_them() -> None:
    shared = resume.head("pc", [(RamBlock("pc.ram", 65536), 0x1000), (RamBlock("b", 4096), 0)])
    messages = whole(shared + resume.end_of_ram() + resume.tail(b""))
    (setup,) = (message for message in messages if "blocks" in message)
    assert setup["blocks"] == [
        {"name": "pc.ram", "size": 65536, "address": 0x1000},
        {"name": "b", "size": 4096, "address": 0},
    ]
    huge = struct.pack(">Q", 0x201000 | RamFlag.MEM_SIZE)
    huge += b"\1a" + struct.pack(">QQ", 1 << 21, 1 << 21)
    huge += b"\1b" + struct.pack(">Q", 4096)
    start = w.ram_setup(BLOCKS).partition(struct.pack(">Q", 65536 + 4096 | 4))[0]
    advise = w.postcopy_advise(0x201000)
    messages = whole(HEAD + advise + start + huge + w.eos() + w.footer() + w.eof())
    assert messages[3]["blocks"] == [
        {"name": "a", "size": 1 << 21, "page-size": 1 << 21}, {"name": "b", "size": 4096},
    ]  # fmt: skip


def test_other_channels() -> None:
    resumed = w.recv_bitmap("pc.ram") + w.postcopy_resume()
    resumed += w.ram_section(w.page("pc.ram", 4096, DATA)) + w.ram_section(b"", last=True) + w.eof()
    assert told(resumed)[1].kind == "recovery"
    assert [message.get("command") for message in whole(resumed)[:2]] == [
        "recv-bitmap", "postcopy-resume",
    ]  # fmt: skip
    urgent = w.page("pc.ram", 4096, DATA) + w.page(None, 8192, DATA)
    for end in (b"", w.eos()):
        messages, found = told(urgent + end)
        assert found.kind == "postcopy-preempt" and found.error is None
        assert messages[0]["ram"][0]["normal"]["pages"] == 2


def _packet(flags: int, offsets: tuple[int, ...], zeros: int = 0, content: bytes = b"") -> bytes:
    normal = len(offsets) - zeros
    head = struct.pack(">IIIIIIQI28x", 0x11223344, 1, flags, 128, normal, len(content), 7, zeros)
    return head + b"pc.ram".ljust(256, b"\0") + struct.pack(
        ">128Q", *offsets, *[0] * (128 - len(offsets))
    ) + content  # fmt: skip


def test_a_channel_of_multifd() -> None:
    stream = struct.pack(">II16sB39x", 0x11223344, 1, bytes(range(16)), 5)
    stream += _packet(0, (4096, 8192, 0x9000), 1, DATA * 2) + _packet(1, ())
    state = struct.pack(">III256sII", 0x11223344, 1, 64, b"vfio", 3, 5) + b"state"
    messages = whole(stream + state)
    assert messages[0]["channel"] == 5
    assert messages[1]["ram"] == [
        {
            "block": "pc.ram",
            "normal": {"pages": 2, "runs": 1, "first": 4096, "last": 8192},
            "duplicate": {"pages": 1, "runs": 1, "first": 0x9000, "last": 0x9000},
        }
    ]
    assert messages[2]["flags"] == ["sync"] and "ram" not in messages[2]
    assert messages[3]["flags"] == ["device-state"] and messages[3]["opaque"] == 5
    broken, found = told(stream + _packet(0, (0,), 0, b"x")[:-1])
    assert len(broken) == 4 and found.error is not None and found.error.exit_code == 4


def test_a_packet_without_data_tells_the_size_of_the_one_before_it() -> None:
    """QEMU 7.2 leaves it there; nothing follows."""
    stream = multifd.opening(0) + multifd.header(0, 0, "pc.ram", [4096]) + DATA
    stream += multifd.header(1, multifd.Flag.SYNC, size=4096)
    stream += multifd.header(2, 0, "pc.ram", zero=[8192], size=4096)
    messages = whole(stream)
    assert [message.get("length") for message in messages] == [None, 4096, 0, 0]


def test_every_truncation_is_told_up_to_there() -> None:
    stream = stream_cases.POSTCOPY
    for size in range(len(stream)):
        messages, found = told(stream[:size])
        assert found.error is not None and found.error.offset is not None
        assert size - found.error.offset < 4096 + 8 and found.error.offset <= size
        assert len(messages) <= size


def test_a_break_says_where_and_what_was_expected() -> None:
    stream = READY + w.ram_section(w.page("pc.ram", 0, DATA))
    _, found = told(stream[:-20])
    began = len(READY)
    assert f"in what began at {began}, at stream offset" in str(found.error)
    assert "4096 bytes expected, 4089 are there" in str(found.error)
    _, found = told(stream)
    assert str(found.error) == f"the stream ends without EOF at stream offset {len(stream)}"
    _, found = told(stream + w.eof() + b"??")
    assert "bytes behind the stream's end" in str(found.error)
    _, found = told(b"hello, world")
    assert "magic" in str(found.error) and "expected 0x5145564d" in str(found.error)


@pytest.fixture
def dump(capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable:
    """Runs the command: exit code, stdout, stderr."""

    def run(stream: bytes, *options: str) -> tuple[int, str, str]:
        path = tmp_path / "recording"
        path.write_bytes(stream)
        code = cli.main(["dump", str(path), *options])
        return code, *capsys.readouterr()

    return run


def test_command(dump: Callable) -> None:
    code, out, err = dump(stream_cases.POSTCOPY)
    assert (code, err) == (0, "")
    assert "POSTCOPY_RAM_DISCARD pc.ram: 0x1000+0x2000, 0x8000+0x1000" in out
    assert "pc.ram, 65536 bytes: " in out and "migration stream, whole" in out
    code, out, err = dump(stream_cases.POSTCOPY[:-9])
    assert code == 4 and "broken" in out and err.startswith("sharded-pc: the stream ends there")


def test_json_is_one_object(dump: Callable) -> None:
    code, out, _ = dump(stream_cases.POSTCOPY, "--json")
    found = json.loads(out)
    assert code == 0 and found["status"] == "whole" and found["error-desc"] is None
    assert found["messages"] == whole(stream_cases.POSTCOPY)
    assert found["blocks"][0] == {
        "name": "pc.ram", "size": 65536, "normal": 1, "duplicate": 1, "discarded-pages": 3,
        "discard-ranges": 2,
    }  # fmt: skip
    code, out, _ = dump(stream_cases.POSTCOPY[:-9], "--json")
    found = json.loads(out)
    assert code == 4 and found["status"] == "broken" and found["error-offset"] > 0
    code, out, _ = dump(b"", "--json")
    assert code == 4 and json.loads(out)["messages"] == []


def test_no_such_file(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert cli.main(["dump", str(tmp_path / "none")]) == 2
    assert cli.main(["dump", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


class _Endless(io.RawIOBase):
    """A long stream that is in no memory: the same section again and again."""

    def __init__(self, head: bytes, section: bytes, times: int) -> None:
        self._parts = iter((head, *[section] * times, w.eof()))

    def read(self, size: int = -1) -> bytes:
        return next(self._parts, b"")


def test_memory_does_not_grow_with_the_stream() -> None:
    oracle = PageOracle((RamBlock("pc.ram", 2 << 20),), zero_share=0)
    section = w.ram_section(oracle.records(0, array("Q", range(512)), oracle.precopied(0)))
    walk_ = Walk(_Endless(HEAD + w.ram_setup(oracle.blocks), section, 200))  # type: ignore[arg-type]
    tracemalloc.start()
    pages = sum(m["ram"][0]["normal"]["pages"] for m in walk_.messages() if "ram" in m)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert walk_.error is None and pages == 200 * 512
    assert peak < 16 << 20
