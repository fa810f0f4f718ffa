"""`sharded-pc bench replay --channels` and `--tls`: what is sent, and that both sides take it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from sharded_pc.bench import packets, recording
from sharded_pc.bench.jobs import Channels
from sharded_pc.bench.product import Product
from sharded_pc.bench.recording import Recording
from sharded_pc.bench.sender import Sender, Where
from sharded_pc.geometry import PAGE_BYTES, RamBlock
from sharded_pc.wire import multifd
from sharded_pc.wire.feed import Feed
from tests.test_bench import bench, measured
from tests.test_bench_replay import bench_clean, recorded  # noqa: F401

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90)]
OLDER, NEWER = "pc-i440fx-7.2", "pc-i440fx-10.0"


def contents(found: Recording) -> dict[str, dict[int, bytes]]:
    """Of each page what the recording says last."""
    pages: dict[str, dict[int, bytes]] = {}
    with recording.mapped(found.path) as data:
        scan = recording.Scan(data)

        def note(header: int, at: int) -> None:
            page = data[at : at + PAGE_BYTES] if at >= 0 else bytes(PAGE_BYTES)
            pages.setdefault(scan.block, {})[header & ~(PAGE_BYTES - 1)] = page

        scan.note = note
        scan.run()
    return pages


def read(made: packets.Packets, found: Recording) -> list[list[multifd.Packet]]:
    """Each channel's, by the reference, behind its opening."""
    with recording.mapped(found.path) as data:
        scan = recording.Scan(data)
        scan.run()
    blocks = {name: RamBlock(name, size) for name, size in scan.blocks.items()}
    channels = []
    for number, (opening, (start, end), last) in enumerate(
        zip(made.openings, made.spans, made.lasts, strict=True)
    ):
        assert multifd.parse_opening(opening[: multifd.OPENING_BYTES]) == number
        raw = opening[multifd.OPENING_BYTES :] + Path(made.path).read_bytes()[start:end] + last
        channels.append(list(Feed(multifd.Reader(blocks).packets()).feed(raw)))
    return channels


@pytest.mark.parametrize(("machine", "method"), [(OLDER, "none"), (NEWER, "zlib")])
def test_the_reference_reads_every_page_once(
    tmp_path: Path,
    recorded: Recording,  # noqa: F811
    machine: str,
    method: str,
) -> None:
    found = dataclasses.replace(recorded, machine=machine)
    made = packets.write(found, tmp_path / "packets", 3, method)
    channels = read(made, found)
    assert sorted(p.number for each in channels for p in each) == list(
        range(sum(map(len, channels)))
    )
    meetings = 2 if found.machine == NEWER else 3
    assert [sum(p.sync for p in each) for each in channels] == [meetings] * 3
    wanted, pages = contents(found), {}
    for packet in (p for each in channels for p in each):
        for index, offset in enumerate(packet.normal):
            page = packet.data[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
            assert pages.setdefault((packet.block, offset), page) is page, "twice"
        for offset in packet.zero:
            assert pages.setdefault((packet.block, offset), b"") == b"", "twice"
    zeros = sum(page == b"" for page in pages.values())
    assert (len(pages) - zeros, zeros) == (made.normal, made.zero if found.machine == NEWER else 0)
    half = PAGE_BYTES // 2 if method == "zlib" else PAGE_BYTES
    for (block, offset), page in pages.items():
        assert page[:half] == wanted[block][offset][:half] or (
            page == b"" and not any(wanted[block][offset])
        )
        assert not any(page[half:])


def test_the_product_takes_every_page(
    tmp_path: Path,
    unique_name: str,
    recorded: Recording,  # noqa: F811
) -> None:
    found = dataclasses.replace(recorded, machine=NEWER)
    made = packets.write(found, tmp_path / "packets", 2, "none")
    with (
        Product(tmp_path, unique_name, f"unix:{tmp_path / 's'}", "--keep") as product,
        Sender() as sender,
    ):
        sent = sender.send(Channels(made), Where(product.uri, 0.0), lambda: [product.pid])
        ending = product.finish()
    assert 0 < sent.sent_ns <= sent.ns and sent.cpu_seconds > 0
    assert (ending.exit_code, ending.info["postcopy-state"]) == (0, "none")
    try:
        for block in ending.info["blocks"]:
            wanted = contents(found)[block["name"]]
            ram = Path("/dev/shm" + block["shm"]).read_bytes()
            assert all(ram[at : at + PAGE_BYTES] == page for at, page in wanted.items())
    finally:
        bench_clean(unique_name)


def test_both_receivers_over_channels_with_and_without_tls(recorded: Recording) -> None:  # noqa: F811
    told = measured(
        "replay", recorded.path, "--peer", "qemu", "--workers", "2", "--transport", "unix",
        "--placement", "copy", "--pause", "0", "--repeat", "1", "--channels", "2",
        "--compression", "zstd", "--tls",
    )  # fmt: skip
    rows = [(r["receiver"], r["channels"], r["compression"], r["tls"]) for r in told["runs"]]
    assert rows == [(who, 2, "zstd", tls) for tls in (False, True) for who in ("qemu", "product")]
    assert [row["tls"] for row in told["results"]] == [False, True]
    for run in told["runs"]:
        assert 0 < run["sent-ns"] <= run["ns"] and run["cpu-seconds"] > 0


def test_a_recording_inside_tls(recorded: Recording) -> None:  # noqa: F811
    done = bench(
        "replay", recorded.path, "--workers", "1", "--transport", "tcp", "--placement", "copy",
        "--pause", "0", "--repeat", "1", "--tls",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[1] for line in done.stdout.splitlines()[4:]] == ["TLS", "False", "True"]


@pytest.mark.parametrize(
    "arguments",
    [["--compression", "zlib"], ["--channels", "0"], ["--channels", "256"],
     ["--channels", "2", "--compression", "lz4"]],
    ids=" ".join,
)  # fmt: skip
def test_bad_options(arguments: list[str]) -> None:
    done = bench("replay", "x", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
