"""`sharded-pc bench replay`: one small recording of a real QEMU, replayed into both receivers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from benchmarks.record import record, zero_runs
from sharded_pc.bench import recording
from sharded_pc.bench.jobs import Whole
from sharded_pc.bench.peer import QemuPeer
from sharded_pc.bench.product import Product
from sharded_pc.bench.recording import Recording
from sharded_pc.bench.sender import Sender, Where
from sharded_pc.errors import GuestLost, RemoteProtocolError, UsageError
from sharded_pc.wire import events
from sharded_pc.wire.feed import read_stream
from tests.qemu.guest_image import MIB
from tests.test_bench import _finish, _start, bench, check_compared, measured

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90)]

MEMORY_MIB = 64
VGA_HOLE = (0xA0000, MIB)
"""No RAM to pmemsave."""


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """The file must not be changed."""
    return record(tmp_path_factory.mktemp("recording") / "stream", MEMORY_MIB)


@pytest.fixture
def copied(recorded: Recording, tmp_path: Path) -> Path:
    """A recording to spoil."""
    shutil.copy(recording.sidecar(recorded.path), tmp_path / "stream.json")
    return Path(shutil.copy(recorded.path, tmp_path / "stream"))


def send(found: Recording, uri: str, pid: int) -> None:
    with Sender() as sender:
        sent = sender.send(Whole(found.path, found.setup_end), Where(uri, 0.0), lambda: [pid])
    assert 0 < sent.sent_ns <= sent.ns
    assert sent.cpu_seconds > 0


# --- the recording ---


def test_it_is_postcopy_nearly_from_the_start(recorded: Recording) -> None:
    pages = recorded.ram // 4096
    assert recorded.normal + recorded.zero == pages
    assert 0.05 * pages < recorded.zero < 0.2 * pages
    assert recorded.setup_end < recorded.package_at < MIB < recorded.size
    assert recorded.machine.startswith("pc-i440fx-")
    assert recorded.qemu is not None


def test_it_is_read_as_the_reference_reads_it(recorded: Recording) -> None:
    reader, kinds, blocks = read_stream(), [], []
    with open(recorded.path, "rb") as file:
        while data := file.read(MIB):
            for event in reader.feed(data):
                kinds.append(type(event))
                blocks += event.blocks if isinstance(event, events.RamBlocks) else ()
    assert reader.done
    assert kinds.count(events.RamPage) == recorded.normal
    assert kinds.count(events.RamZeroPage) == recorded.zero
    assert sum(block.size for block in blocks) == recorded.ram


def test_its_offsets_are_where_the_switch_is(recorded: Recording) -> None:
    content = Path(recorded.path).read_bytes()
    assert content[recorded.package_at :].startswith(b"\x08\x00\x07\x00\x04")
    assert content[recorded.setup_end - 5] == 0x7E  # the set-up section's footer
    told = json.loads(recording.sidecar(recorded.path).read_text())
    assert (told["setup-end"], told["package-at"]) == (recorded.setup_end, recorded.package_at)


def test_zero_runs_are_a_tenth_and_do_not_touch() -> None:
    runs = list(zero_runs(1 << 18, seed=3))
    assert sum(count for _, count in runs) == pytest.approx((1 << 18) / 10, rel=0.15)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))
    assert runs[-1][0] + runs[-1][1] <= 1 << 18


def test_qemu_and_the_product_place_the_same_memory(
    recorded: Recording, tmp_path: Path, unique_name: str
) -> None:
    stream = f"unix:{tmp_path / 's'}"
    with Product(tmp_path, unique_name, stream, "--keep") as product:
        send(recorded, product.uri, product.pid)
        ending = product.finish()
    assert (ending.exit_code, ending.info["status"]) == (0, "completed")
    assert ending.cpu_seconds > 0
    (block,) = (each for each in ending.info["blocks"] if each["name"] == "pc.ram")
    try:
        ours = bytearray(Path("/dev/shm" + block["shm"]).read_bytes())
    finally:
        bench_clean(unique_name)
    assert recorded.qemu is not None
    with QemuPeer(recorded.qemu.command, tmp_path) as peer:
        send(recorded, peer.listen(stream), peer.pid)
        peer.wait("completed")
        theirs = bytearray(peer.guest_memory(0, MEMORY_MIB * MIB))
    for memory in (ours, theirs):
        memory[slice(*VGA_HOLE)] = b""
    assert len(ours) == len(theirs)
    assert ours == theirs


def bench_clean(name: str) -> None:
    from sharded_pc.cli import main

    assert main(["clean", "--kept", "--name", name]) == 0


# --- the bench ---


def test_every_receiver_in_every_round(recorded: Recording) -> None:
    told = measured(
        "replay", recorded.path, "--peer", "qemu", "--workers", "2", "--transport", "unix",
        "--pause", "0.2", "--repeat", "2",
    )  # fmt: skip
    rows = [(r["repeat"], r["receiver"], r["workers"], r["placement"]) for r in told["runs"]]
    each = [("qemu", None, None), ("product", 2, "copy"), ("product", 2, "continue")]
    assert rows == [(repeat, *row) for repeat in (0, 1) for row in each]
    assert told["parameters"]["pause"] == 0.2
    assert told["recording"] == json.loads(json.dumps(dataclasses.asdict(recorded)))
    for run in told["runs"]:
        assert 0 < run["sent-ns"] <= run["ns"]
        assert run["gb-per-second"] == pytest.approx(recorded.payload / run["ns"])
        assert run["cpu-seconds"] > 0
        assert run["memory"]["peak"] >= run["memory"]["private"] > 0


def test_results_compare_with_qemu(recorded: Recording) -> None:
    told = measured(
        "replay", recorded.path, "--peer", "qemu", "--workers", "1", "--transport", "tcp",
        "--placement", "copy", "--pause", "0", "--repeat", "1",
    )  # fmt: skip
    (row,) = told["results"]
    assert (row["transport"], row["workers"], row["placement"]) == ("tcp", 1, "copy")
    for figure in ("ms", "gb-per-second", "cpu-seconds-per-gib"):
        found = row[figure]
        check_compared({"floor": found.pop("qemu"), **found})


def test_table_without_a_peer(recorded: Recording) -> None:
    done = bench(
        "replay", recorded.path, "--workers", "1", "--placement", "copy", "--transport", "unix",
        "--pause", "0.3", "--repeat", "1",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"bench replay: {recorded.payload >> 20} MiB in {recorded.normal} ")
    assert lines[1].startswith("from 0.3 s after the set-up section to SHUT")
    assert "product GB/s" in lines[4] and "QEMU" not in lines[4]
    assert len(lines) == 6


def test_interrupted_it_leaves_nothing(recorded: Recording) -> None:
    process = _start("replay", recorded.path, "--peer", "qemu", "--transport", "unix")
    segment = Path(f"/dev/shm/bench-{process.pid}-0%control")
    while not segment.exists():  # the first receiver has started
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    done = _finish(process)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")


# --- what is refused ---


def spoil(how: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (spoil(lambda raw: raw[: len(raw) // 2]), "ended in the middle"),
        (spoil(lambda raw: raw[:-1]), "ended in the middle"),
        (spoil(lambda raw: raw[:100]), "ended in the middle"),
        (spoil(lambda raw: b""), "it is empty"),
        (spoil(lambda raw: raw + b"\0\0"), "2 bytes behind the stream's end"),
        (spoil(lambda raw: b"#!/bin/sh\n" * 9), "not a migration stream"),
    ],
    ids=["half", "last byte", "set-up", "empty", "more", "another file"],
)
def test_what_is_no_whole_recording(copied: Path, how: Callable, text: str) -> None:
    how(copied)
    with pytest.raises(RemoteProtocolError, match=text) as caught:
        recording.read(copied)
    assert str(copied) in str(caught.value)


def test_a_bad_recording_is_one_line_and_an_exit_code(copied: Path) -> None:
    spoil(lambda raw: raw[: len(raw) // 2])(copied)
    done = bench("replay", str(copied))
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"sharded-pc: recording {copied}: the stream ended")
    assert done.stderr.count("\n") == 1


def test_no_such_file(tmp_path: Path) -> None:
    done = bench("replay", str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", [None, "{}", '{"size": 1, "qemu": {}}', "no json"])
def test_a_peer_needs_what_the_recipe_writes(copied: Path, text: str | None) -> None:
    recording.sidecar(copied).unlink()
    if text is not None:
        recording.sidecar(copied).write_text(text)
    done = bench("replay", str(copied), "--peer", "qemu")
    assert (done.returncode, done.stdout) == (2, "")
    assert "benchmarks.record" in done.stderr


def test_a_sidecar_of_another_recording(copied: Path) -> None:
    beside = recording.sidecar(copied)
    beside.write_text(json.dumps({**json.loads(beside.read_text()), "size": 4711}))
    with pytest.raises(UsageError, match="4711 bytes there"):
        recording.read(copied)


def test_a_qemu_that_does_not_fit_says_why(copied: Path) -> None:
    beside = recording.sidecar(copied)
    told = json.loads(beside.read_text())
    command = told["qemu"]["command"]
    command[command.index("-m") + 1] = "32"
    beside.write_text(json.dumps(told))
    done = bench("replay", str(copied), "--peer", "qemu", "--repeat", "1", "--transport", "unix")
    assert (done.returncode, done.stdout) == (GuestLost.exit_code, "")
    assert "QEMU ended with 1" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x", "--peer", "xen"],
        ["x", "--placement", "both"],
        ["x", "--placement", "copy,copy"],
        ["x", "--transport", "unix,"],
        ["x", "--pause", "-1"],
        ["x", "--pause", "nan"],
        ["x", "--pause", "soon"],
        ["x", "--workers", "0"],
        ["x", "--size", "8M"],
    ],
    ids=" ".join,
)
def test_bad_options(arguments: list[str]) -> None:
    done = bench("replay", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
