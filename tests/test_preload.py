"""The preload library: a process that knows nothing of us becomes a guest when it maps the RAM."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sharded_pc import shm
from sharded_pc.attach import preload, protocol
from sharded_pc.errors import HostError
from sharded_pc.geometry import RamBlock
from sharded_pc.testing.oracle import PageOracle
from sharded_pc.transport import fds
from tests.preload_kit import (
    EXIT_HOST,
    MIB,
    WAIT_S,
    Client,
    FakeReceiver,
    Source,
    complaint,
    fake,
    guest_of,
    place_where_it_waits,
    program,
    ram,
    ram_file,
)
from tests.qemu import wait_until
from tests.qemu.backports import QemuBinary
from tests.receiver import Receiver

BLOCKS = (RamBlock("pc.ram", 24 * MIB), RamBlock("/rom@etc/acpi", 2 * MIB + 4096))
ORACLE = PageOracle(BLOCKS, seed=77)

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.uffd,
]


# --- with a real receiver ---


def wait_guests(receiver: Receiver, count: int) -> None:
    status = lambda: receiver.status()["sharded"]["guests"]  # noqa: E731
    wait_until(lambda: status() == count, f"{count} guests", WAIT_S)


def versions_files(folder: Path) -> list[Path]:
    paths = [folder / f"versions{index}" for index in range(len(BLOCKS))]
    for index, path in enumerate(paths):
        path.write_bytes(ORACLE.final(index))
    return paths


def test_guest_reads_right_bytes(tmp_path: Path, unique_name: str, program: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x" * 8192)
    ram_versions, rom_versions = versions_files(tmp_path)
    with (
        Receiver(tmp_path, unique_name, None, "--workers", "3", keep=False) as receiver,
        Source(receiver, ORACLE, 12 * MIB) as source,
    ):
        ram, rom = source.files()
        environment = preload.environment(str(receiver.attach_path), [ram, str(shm.ROOT / rom)])
        words = [
            "anonymous", "plain", other, "environ", "say", "before",
            "mmap64", shm.ROOT / rom, "fixed", shm.ROOT / ram,
            "uffds", "environ", "say", "mapped", "wait",
            "visit", 0, ORACLE.seed, ram_versions, "anonymous", "half", other,
            "no-uffds", "plain", shm.ROOT / rom, "visit", 1, ORACLE.seed, rom_versions,
        ]  # fmt: skip
        with Client(program, environment, *words) as client:
            while client.hear() != "mapped":
                assert client.process.poll() is None, client.finish()
            wait_guests(receiver, 1)
            source.switch()
            with source.postcopy():
                client.go_on()
                lines = client.finish()
            assert receiver.finish().exit_code == 0
    assert "uffds 3" in lines
    assert [line for line in lines if line.startswith("visited")] == [
        f"visited {block.pages}" for block in BLOCKS
    ]
    mapped = lines.index("mapped")
    ours = [line for line in lines if "PRELOAD" in line or "SHARDED_PC_ATTACH" in line]
    assert ours and not set(ours) & set(lines[lines.index("uffds 3") : mapped])
    assert source.source.requested_pages > 100


def test_both_blocks_while_missing(tmp_path: Path, unique_name: str, program: Path) -> None:
    ram_versions, rom_versions = versions_files(tmp_path)
    with (
        Receiver(tmp_path, unique_name, keep=False) as receiver,
        Source(receiver, ORACLE, 12 * MIB) as source,
    ):
        ram, rom = (shm.ROOT / name for name in source.files())
        environment = preload.environment(str(receiver.attach_path), source.files())
        words = ["say", "mapped", "wait"]
        with (
            Client(program, environment, "fixed", rom, "fixed", ram, *words,
                   "visit", 0, ORACLE.seed, ram_versions) as first,
            Client(program, environment, "plain", ram, "fixed", rom, *words,
                   "visit", 1, ORACLE.seed, rom_versions) as second,
        ):  # fmt: skip
            assert [first.hear(), second.hear()] == ["mapped"] * 2
            source.switch()
            with source.postcopy():
                first.go_on()
                second.go_on()
                assert second.finish()[-1] == f"visited {BLOCKS[1].pages}"
                assert first.finish()[-1] == f"visited {BLOCKS[0].pages}"
            assert receiver.finish().exit_code == 0


def test_refused_by_real_receiver(tmp_path: Path, unique_name: str, program: Path) -> None:
    """Memory of another receiver."""
    foreign = shm.ROOT / f"{unique_name}.foreign"
    with (
        Receiver(tmp_path, unique_name, keep=False) as receiver,
        ram_file(foreign, 4096),
        Source(receiver, ORACLE, None),
    ):
        environment = preload.environment(str(receiver.attach_path), [str(foreign)])
        with Client(program, environment, "fixed", foreign, "say", "mapped") as client:
            line = complaint(f"attach: {foreign} is not memory of this receiver")
            assert client.finish(EXIT_HOST, line) == []


# --- with a fake receiver ---


def test_reconnects(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    """And while nobody is there, an access waits."""
    words = ["plain", ram[1], "fixed", ram[0], "addresses", "wait", "read", 5000, "no-uffds"]
    with Client(program, guest_of(fake, ram), *words) as client:
        with fake.connection() as connection:
            first = connection.attach(fake.offer(), slowly=True)
            assert kinds(connection.heard_fds) == ["anon_inode:[userfaultfd]"] * 2
        assert list(first) == [b["name"] for b in fake.offer()["geometry"]["blocks"]]
        ram_address, rom_address = first.values()
        assert client.hear() == f"{rom_address} {ram_address}"
        with fake.gone():
            client.go_on()
        with fake.connection() as connection:  # the receiver that comes next refuses at first
            connection.hear()
            connection.say(protocol.error("not yet"))
        with fake.connection() as connection:
            assert connection.attach(fake.offer()) == first
            assert kinds(connection.heard_fds) == ["anon_inode:[userfaultfd]"] * 2
            connection.say(protocol.event(protocol.READY))
            fault = place_where_it_waits(connection.heard_fds[0], b"z" * 4096)
            assert fault & -4096 == ram_address + 4096
            assert client.hear() == str(ord("z"))
            connection.say(protocol.event(protocol.COMPLETED))
            assert connection.hear() is None
        client.finish(0, r"(sharded_pc preload: .*\n)+")


def kinds(descriptors: Sequence[int]) -> list[str]:
    return [os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors]


def test_says_what_happens_while_reconnecting(
    fake: FakeReceiver, ram: list[Path], program: Path
) -> None:
    with Client(program, guest_of(fake, ram[:1]), "fixed", ram[0], "no-uffds") as client:
        with fake.connection() as connection:
            connection.attach(fake.offer())
            connection.say(protocol.event(protocol.FAILED, 'the "wire" broke'))
        with fake.connection() as connection:
            connection.hear()
            connection.say(fake.offer(shards=1), with_ram=True)
            assert connection.hear() is None
        with fake.connection() as connection:  # everything has arrived meanwhile
            connection.attach(fake.offer(mode=None))
            connection.say(protocol.event(protocol.COMPLETED))
        client.finish(0, "".join(map(complaint, (
            'the migration failed: the "wire" broke; accesses to missing pages wait, '
            "attaching again",
            "attach again: the receiver deals the memory to other shards than before; trying on",
            "attached again",
        ))))  # fmt: skip


def test_everything_has_arrived(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    ram[0].write_bytes(b"y" * ram[0].stat().st_size)
    words = ["fixed", ram[0], "uffds", "read", "5000"]
    with Client(program, guest_of(fake, ram[:1]), *words) as client:
        with fake.connection() as connection:
            connection.attach(fake.offer(mode=None))
            connection.say(protocol.event(protocol.COMPLETED))
        assert client.finish() == ["uffds 0", str(ord("y"))]


REFUSALS: dict[str, tuple[Callable[[FakeReceiver], tuple[object, bool]], str]] = {
    "an error": (
        lambda fake: (protocol.error('attach version 1, "2" expected'), False),
        'the receiver refused: attach version 1, "2" expected',
    ),
    "another version": (
        lambda fake: (fake.offer(version=2), True),
        "geometry version 2, expected 1",
    ),
    "another mode": (
        lambda fake: (fake.offer(mode="wp"), True),
        "the receiver wants a mode that this library does not know",
    ),
    "no shards": (lambda fake: (fake.offer(shards=0), True), "0 shards, expected 1 to 253"),
    "bad stripes": (
        lambda fake: (fake.offer(**{"stripe-size": 5000}), True),
        "stripes of 5000 bytes, expected whole pages",
    ),
    "no descriptors": (lambda fake: (fake.offer(), False), "0 descriptors came for 2 blocks"),
    "failed": (lambda fake: (protocol.event(protocol.FAILED, "no luck"), False),
               "the migration failed: no luck"),
    "something else": (lambda fake: ({"return": {}}, False),
                       "the receiver said what the attach protocol does not allow"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    make, why = REFUSALS[case]
    with (
        Client(program, guest_of(fake, ram[:1]), "fixed", ram[0], "say", "mapped") as client,
        fake.connection() as connection,
    ):
        connection.hear()
        message, with_ram = make(fake)
        connection.say(message, with_ram)
        assert client.finish(EXIT_HOST, complaint(re.escape(f"attach: {why}"))) == []


RUBBISH = [
    b"x", b"[]", b"\0{}", b'{"geometry": 1}', b'{"geometry": {"version": 01}}', b'{"a": tru}',
    b'{"geometry": {"blocks": []}}', b'{"a": "\\x"}', b'{"a": "\\u12g4"}', b'{"a": "\n"}', b"{]",
    b'{"geometry": {"shards": 18446744073709551616}}', b'{"geometry": {"shards": 1.5}}',
    b'{"geometry": {"shards": -1}}', b'{"a": 1,}', b'{"a" 1}', b"{" + b'"a": {' * 40 + b"}" * 41,
    b'{"geometry": {"blocks": [%s]}}' % b", ".join(
        [b'{"name": "a", "size": 4096, "first-stripe": 0}'] * 254
    ),
    b'{"a": "' + b"a" * (256 << 10),
]  # fmt: skip


def test_rubbish(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    for data in RUBBISH:
        with (
            Client(program, guest_of(fake, ram[:1]), "fixed", ram[0]) as client,
            fake.connection() as connection,
        ):
            connection.hear()
            connection.say_bytes(data)
            line = r"attach: .*(does not allow|is longer than 262144 bytes)"
            assert client.finish(EXIT_HOST, complaint(line)) == [], data


def test_long_block_list(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    """As long as it gets: 250 blocks with names of 255 bytes, each six bytes of JSON."""
    offer = fake.offer()
    (block, _) = offer["geometry"]["blocks"]
    offer["geometry"]["blocks"] = [{**block, "name": "ü" * 127 + f"{n}"} for n in range(250)]
    assert 200_000 < len(fds.encode(offer)) < 256 << 10
    with Client(program, guest_of(fake, ram[:1]), "fixed", ram[0], "no-uffds") as client:
        with fake.connection() as connection:
            connection.hear()
            connection.say(offer, with_ram=250)
            assert list(connection.hear()["mappings"]["addresses"]) == ["ü" * 127 + "0"]
            connection.say({"attached": {"guest": 0}})
            connection.say(protocol.event(protocol.COMPLETED))
        client.finish()


def test_failed_migration_is_no_memory(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    """Nothing would be registered, and pages are missing."""
    with (
        Client(program, guest_of(fake, ram[:1]), "fixed", ram[0], "read", "0") as client,
        fake.connection() as connection,
    ):
        connection.attach(fake.offer(mode=None))
        connection.say(protocol.event(protocol.FAILED, "lost"))
        client.finish(EXIT_HOST, complaint("attach: the migration failed: lost"))


def test_receiver_says_nothing(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    environment = guest_of(fake, ram[:1], timeout=0.1)
    with Client(program, environment, "fixed", ram[0]) as client, fake.connection():
        client.finish(EXIT_HOST, complaint("attach: the receiver did not answer in time"))


# --- without a receiver ---


def test_no_socket(tmp_path: Path, ram: list[Path], program: Path) -> None:
    path = tmp_path / "attach"
    environment = preload.environment(str(path), [ram[0].name])
    with Client(program, environment, "fixed", ram[0]) as client:
        line = complaint(f"attach: connect to {path}: No such file or directory")
        client.finish(EXIT_HOST, line)


BAD_MAPPINGS = {
    "half": "mapped in part: the whole file must be mapped at once",
    "private": "mapped private: use share=on",
}


@pytest.mark.parametrize("how", BAD_MAPPINGS)
def test_bad_mappings(how: str, fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    with Client(program, guest_of(fake, ram[:1]), how, ram[0], "read", "0") as client:
        client.finish(EXIT_HOST, complaint(f"{ram[0]}: {BAD_MAPPINGS[how]}"))


def test_second_mapping(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    """Before the hand-over and after it."""
    words = ["fixed", ram[0], "plain", ram[0], "fixed", ram[1], "say", "mapped"]
    with Client(program, guest_of(fake, ram), *words) as client:
        client.finish(
            EXIT_HOST,
            complaint(f"{ram[0]}: mapped a second time: it cannot be registered there"),
        )
    words = ["fixed", ram[0], "readonly", ram[0], "say", "mapped"]
    with (
        Client(program, guest_of(fake, ram[:1]), *words) as client,
        fake.connection() as connection,
    ):
        connection.attach(fake.offer())
        client.finish(
            EXIT_HOST,
            complaint(f"{ram[0]}: mapped again after it was handed over: .* registered there"),
        )


def test_child_does_not_attach(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    words = ["fork-map", ram[0], "anonymous", "say", "alive"]
    with Client(program, guest_of(fake, ram), *words) as client:
        line = complaint(rf"{ram[0]}: mapped by a child of .*daemonize\?\)")
        assert client.finish(0, line) == [f"child {EXIT_HOST}", "alive"]


def test_early_access_cannot_be_silent(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    """Of two files only one is mapped, and used: that is a crash, not a page of zeros."""
    with Client(program, guest_of(fake, ram), "fixed", ram[0], "read", "0") as client:
        assert client.finish(-11) == []
    assert ram[0].stat().st_blocks == 0


def test_never_mapped(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    words = ["anonymous", "plain", preload.__file__, "environ", "uffds"]
    with Client(program, guest_of(fake, ram), *words) as client:
        lines = client.finish()
    assert lines[-1] == "uffds 0"
    # It may be a shell in front of the program that maps them.
    assert [line for line in lines if re.search("PRELOAD|SHARDED_PC_(ATTACH|SEG)", line)]


def test_other_preloads_stay(fake: FakeReceiver, ram: list[Path], program: Path) -> None:
    environment = guest_of(fake, ram)
    environment["LD_PRELOAD"] += ":libc.so.6"
    words = ["plain", ram[0], "fixed", ram[1], "environ"]
    with Client(program, environment, *words) as client, fake.connection() as connection:
        connection.attach(fake.offer())
        assert "LD_PRELOAD=libc.so.6" in client.finish()


BAD_ENVIRONMENTS = {
    "SHARDED_PC_SEGMENTS: is not set": {"SHARDED_PC_SEGMENTS": None},
    "SHARDED_PC_ATTACH: is not set": {"SHARDED_PC_ATTACH": None},
    "SHARDED_PC_SEGMENTS: names no file": {"SHARDED_PC_SEGMENTS": ",:"},
    "/dev/shm/no-such: No such file or directory": {"SHARDED_PC_SEGMENTS": "/no-such"},
    "SHARDED_PC_ATTACH_TIMEOUT: expected a number of seconds": {"SHARDED_PC_ATTACH_TIMEOUT": "5m"},
}


@pytest.mark.parametrize("line", BAD_ENVIRONMENTS)
def test_bad_environments(line: str, ram: list[Path], program: Path) -> None:
    environment: dict = preload.environment("attach", [path.name for path in ram])
    environment |= BAD_ENVIRONMENTS[line]
    environment = {name: value for name, value in environment.items() if value is not None}
    with Client(program, environment, "say", "started") as client:
        assert client.finish(EXIT_HOST, complaint(line)) == []


def test_idle_without_variables(ram: list[Path], program: Path) -> None:
    environment = {"LD_PRELOAD": str(preload.library_path())}
    with Client(program, environment, "fixed", ram[0], "read", "0", "environ") as client:
        lines = client.finish()
    assert lines[0] == "0" and f"LD_PRELOAD={preload.library_path()}" in lines


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "FILE", "libnone.so")
    with pytest.raises(HostError, match=r"libnone.so is missing: run `pip install"):
        preload.library_path()


# --- QEMU ---

QEMU_RAM = 64 * MIB


@pytest.mark.qemu
@pytest.mark.timeout(90)
def test_qemu_attaches(tmp_path: Path, unique_name: str, binary: QemuBinary) -> None:
    """A stock QEMU, its RAM on a receiver that knows no more than the block list."""
    pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")
    from tests.qemu.vm import QemuVm

    pages = PageOracle((RamBlock("pc.ram", QEMU_RAM),))
    with (
        Receiver(
            tmp_path, unique_name, None, "--workers", "2", "--placement", "copy", keep=False
        ) as receiver,
        Source(receiver, pages, None) as source,
    ):
        (ram,) = source.files()
        memory = f"memory-backend-file,id=pc.ram,size=64M,mem-path={shm.ROOT / ram},share=on"
        vm = QemuVm(
            tmp_path, "dst", binary=binary, machine="pc,memory-backend=pc.ram", memory_mib=64,
            incoming="defer", extra=["-object", memory],
            environment=preload.environment(str(receiver.attach_path), [ram]),
        )  # fmt: skip
        with vm:
            wait_guests(receiver, 1)
            assert vm.run_state() == "inmigrate"
            assert open_uffds(vm.pid) == 2
            assert (shm.ROOT / ram).stat().st_blocks == 0  # QEMU has touched none of it
            source.switch()
            with source.postcopy():
                pass
            assert receiver.finish().exit_code == 0
            wait_until(lambda: open_uffds(vm.pid) == 0, "COMPLETED", WAIT_S)
            assert vm.run_state() == "inmigrate"
            assert vm.hmp("xp /1gx 0x200000").split()[-1] == first_word(pages, 0x200)
            assert vm.quit() == 0
            assert vm.stderr() == ""


def open_uffds(pid: int) -> int:
    links = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return sum("userfaultfd" in link for link in links)


def first_word(pages: PageOracle, page: int) -> str:
    """As the human monitor prints it."""
    content = pages.page(0, page, pages.final(0)[page])
    return f"{int.from_bytes(content[:8], 'little'):#018x}"
