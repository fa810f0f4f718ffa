"""The QEMU side of the tests is itself right: guest, process, memory, binaries.

What is proved here may be relied on by tests of the receiver: a guest that prints passes and no
``E`` has its memory, and ``differences() == {}`` means equal to the last byte.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import backports, guest_image, memory
from tests.qemu.backports import QemuBinary
from tests.qemu.guest_image import MIB, write_image
from tests.qemu.vm import QemuVm, VmError

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

MEMORY_MIB = 64


def booted(folder: Path, binary: QemuBinary, writes: bool = True, **options) -> QemuVm:
    """A VM with our guest, started by a ``with`` block."""
    image = write_image(folder / "guest.img", MEMORY_MIB, writes=writes)
    options = {"name": "src", "memory_mib": MEMORY_MIB, **options}
    return QemuVm(folder, binary=binary, image=image, **options)


def write_process(pid: int, address: int, content: bytes) -> None:
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as file:
        file.seek(address)
        file.write(content)


class TestGuestImage:
    def test_boot_sector_is_bootable(self):
        assert len(sector := guest_image.boot_sector()) == 512
        assert sector[-2:] == b"\x55\xaa"

    @pytest.mark.parametrize(
        "bounds",
        [{"start": 0}, {"end": MIB}, {"end": 1 << 32}, {"step": 100}, {"scattered": True}],
        ids=str,
    )
    def test_bad_bounds_are_refused(self, bounds):
        with pytest.raises(ValueError, match=r"bad bounds|power of two"):
            guest_image.boot_sector(**bounds)

    def test_jumps_are_relative_to_their_end(self):
        code = guest_image.assemble("a: eb @a ; jmp a\n eb @b 90\nb: ea &a {n}", n=0x01020304)
        assert code == bytes.fromhex("ebfe eb01 90 ea 007c 04030201")

    @pytest.mark.parametrize("machine", ["pc", "q35"])
    @pytest.mark.parametrize("writes", [True, False], ids=["busy", "check"])
    def test_guest_reports_passes(self, tmp_path, binary, machine, writes):
        with booted(tmp_path, binary, writes, machine=machine) as vm:
            output = vm.wait_serial(".", count=5)
        assert output.startswith("SF..")
        assert vm.wrong_words() == []

    def test_scattered_guest_visits_every_page_once(self, tmp_path, binary):
        image = write_image(tmp_path / "guest.img", MEMORY_MIB, writes=False, scattered=True)
        with QemuVm(tmp_path, binary=binary, memory_mib=MEMORY_MIB, image=image) as vm:
            vm.wait_serial("F")
            vm.qmp("stop")
            ram = memory.blocks(vm)["pc.ram"].read()
        pages = range(MIB, MEMORY_MIB * MIB, 4096)
        visited = [at for at in pages if ram[at : at + 4] == at.to_bytes(4, "little")]
        assert visited == list(range(MIB, 33 * MIB, 4096))

    @pytest.mark.parametrize("writes", [True, False], ids=["busy", "check"])
    @pytest.mark.parametrize("offset", [0, 4096 - 8], ids=["first", "last"])
    def test_guest_notices_a_wrong_word(self, tmp_path, binary, writes, offset):
        with booted(tmp_path, binary, writes) as vm:
            vm.wait_passes(1)
            vm.qmp("stop")
            address = 5 * MIB + offset
            ram = memory.blocks(vm)["pc.ram"]
            write_process(vm.pid, ram.host_address + address, b"\xef\xbe\xad\xde")
            vm.qmp("cont")
            vm.wait_serial("E")
            vm.wait_passes(1)
        assert (address, 0xDEADBEEF) in vm.wrong_words()


class TestProcess:
    def test_refused_start_shows_stderr(self, tmp_path, binary):
        vm = QemuVm(tmp_path, binary=binary, extra=["-no-such-option"])
        with pytest.raises(VmError, match="no-such-option"):
            vm.start()
        assert not vm.alive()

    def test_leaving_the_block_ends_the_process(self, tmp_path, binary):
        with QemuVm(tmp_path, binary=binary) as vm:
            assert vm.alive()
        with pytest.raises(ProcessLookupError):
            os.kill(vm.pid, 0)

    def test_events_and_states(self, tmp_path, binary):
        with booted(tmp_path, binary) as vm:
            vm.qmp("stop")
            assert vm.wait_event("STOP")["event"] == "STOP"
            assert vm.run_state() == "paused"
            with pytest.raises(VmError, match="event STOP"):
                vm.wait_event("STOP", timeout=0.05)
            assert vm.quit() == 0

    def test_wait_on_a_dead_vm_ends_at_once(self, tmp_path, binary):
        with QemuVm(tmp_path, binary=binary) as vm:
            vm.quit()
            with pytest.raises(VmError, match="ended with 0"):
                vm.wait_serial("never")
            with pytest.raises(VmError):
                vm.wait_event("NEVER")


class TestMemory:
    def test_pmemsave_agrees_with_the_process(self, tmp_path, binary):
        with booted(tmp_path, binary, extra=["-vga", "std"]) as vm:
            vm.wait_passes(1)
            vm.qmp("stop")
            ours = {name.rpartition("/")[2]: block for name, block in memory.blocks(vm).items()}
            ranges = memory.guest_ranges(vm)
            assert {"pc.ram", "pc.bios", "vga.vram"} <= {part.region for part in ranges}
            for part in ranges:
                got = memory.pmemsave(vm, part.address, part.length)
                assert got == ours[part.region].read(part.offset, part.length), part

    @pytest.mark.parametrize("machine", ["pc", "q35"])
    def test_every_block_has_a_known_address(self, tmp_path, binary, machine):
        with booted(tmp_path, binary, machine=machine) as vm:
            found = memory.blocks(vm)
            blobs = {"tables", "table-loader", "rsdp"}
            assert {"pc.ram", "pc.bios", "pc.rom"} <= set(found)
            assert blobs <= {name.rpartition("/")[2] for name in found}
            assert all(block.host_address for block in found.values())
            assert found["/rom@etc/acpi/rsdp"].read().startswith(b"RSD PTR ")
            assert len(memory._dont_fork_mappings(vm.pid)) == len(found)

    def test_address_by_length_is_the_one_qemu_tells(self, tmp_path, newer):
        """The way of 7.2, checked where QEMU prints the address."""
        with booted(tmp_path, newer, extra=["-vga", "std"]) as vm:
            mappings = memory._dont_fork_mappings(vm.pid)
            for block in memory._list_blocks(vm):
                assert block.host_address in memory._fitting(block, mappings), block

    def test_blocks_of_one_length_are_not_guessed(self, tmp_path, binary):
        with booted(tmp_path, binary, extra=["-vga", "std"]) as vm:
            vm.wait_serial("F")
            block = memory.blocks(vm)["/rom@etc/table-loader"]  # 64 KiB, as vga.rom
            content = next(block.possible_contents())
            assert block.contains(content) > block.contains(content[::-1])
            if len(block.candidates) > 1:
                with pytest.raises(LookupError):
                    block.read()

    def test_ram_above_4_gib_is_found_at_its_offset(self, tmp_path, binary):
        with QemuVm(tmp_path, binary=binary, memory_mib=4096, extra=["-S"]) as vm:
            high = [part for part in memory.guest_ranges(vm) if part.address >= 1 << 32]
            assert [(part.region, part.offset) for part in high] == [("pc.ram", 3 << 30)]
            ram = memory.blocks(vm)["pc.ram"]
            write_process(vm.pid, ram.host_address + (3 << 30), b"high")
            assert memory.pmemsave(vm, 1 << 32, 4) == b"high" == ram.read(3 << 30, 4)

    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            (b"", b"", []),
            (b"x" * 8192, b"x" * 8192, []),
            (b"x" * 8192, b"x" * 4096 + b"y" + b"x" * 4095, [1]),
            (b"x" * 4096, b"x" * 4097, [1]),
            (bytes(3 * MIB), bytes(2 * MIB) + b"\1" + bytes(MIB - 2) + b"\1", [512, 767]),
        ],
        ids=["empty", "equal", "one", "longer", "chunks"],
    )
    def test_differing_pages(self, a, b, expected):
        assert memory.differing_pages(a, b) == expected
        assert memory.differing_pages(memoryview(b), bytearray(a)) == expected


def migration_pair(folder: Path, binary: QemuBinary, writes: bool) -> tuple[QemuVm, QemuVm]:
    """A source and the destination to it, alike but for ``-incoming``."""
    destination = booted(folder, binary, writes, name="dst", incoming="defer")
    return booted(folder, binary, writes), destination


def start_migration(source: QemuVm, destination: QemuVm, bandwidth: int) -> None:
    """Precopy with postcopy allowed, at ``bandwidth`` bytes/s; it does not end by itself."""
    uri = f"unix:{source.folder / 'mig'}"
    for vm in (source, destination):
        vm.set_capabilities(postcopy_ram=True)
    source.set_parameters(max_bandwidth=bandwidth, downtime_limit=1)
    destination.qmp("migrate-incoming", uri=uri)
    source.migrate(uri)


def wait_ram(vm: QemuVm, key: str, least: int) -> None:
    """Waits until ``query-migrate``'s ``ram[key]`` is ``least`` or more."""
    vm.wait_until(lambda: vm.query_migrate().get("ram", {}).get(key, 0) >= least, key)


class TestMigration:
    def test_busy_guest_survives_precopy_and_postcopy(self, tmp_path, newer):
        source, destination = migration_pair(tmp_path, newer, writes=True)
        with source, destination:
            source.wait_serial("F")
            start_migration(source, destination, bandwidth=256 * MIB)
            wait_ram(source, "dirty-sync-count", 3)
            source.start_postcopy()
            source.wait_event("STOP")
            destination.wait_event("RESUME")
            info = source.wait_migration("completed")
            destination.wait_migration("completed")
            destination.wait_passes(3)
        assert info["ram"]["postcopy-requests"] > 0
        assert source.wrong_words() == destination.wrong_words() == []

    def test_checking_guest_is_equal_on_both_sides(self, tmp_path, binary):
        source, destination = migration_pair(tmp_path, binary, writes=False)
        with source, destination:
            source.wait_serial("F")
            start_migration(source, destination, bandwidth=4 * MIB)
            wait_ram(source, "transferred", MIB)
            source.start_postcopy()
            source.wait_migration("completed")
            destination.wait_migration("completed")
            destination.wait_passes(2)
            destination.qmp("stop")
            received = {name: block.read() for name, block in memory.blocks(destination).items()}
            assert memory.differences(source, received) == {}
            received["pc.ram"] = received["pc.ram"][:-1] + b"\1"
            assert memory.differences(source, received) == {"pc.ram": [MEMORY_MIB * 256 - 1]}
        assert destination.wrong_words() == []

    def test_failed_migration_ends_the_wait(self, tmp_path, binary):
        with booted(tmp_path, binary) as vm:
            vm.wait_serial("F")
            vm.migrate("exec:false")
            with pytest.raises(VmError, match="migration is failed, not completed"):
                vm.wait_migration("completed")


def qemu(major: int) -> QemuBinary:
    return QemuBinary(Path("/nowhere"), (major, 0, 0))


def pretend(monkeypatch, cached, distribution=None) -> None:
    """Those are the QEMUs there are."""
    found = tuple(cached)
    monkeypatch.setattr(backports, "cached_qemus", lambda: found)
    monkeypatch.setattr(backports, "distribution_qemu", lambda: distribution)


class TestBackports:
    @pytest.fixture
    def apt(self, tmp_path, monkeypatch) -> Path:
        """An apt configuration of our own, of a Debian called bookworm."""
        (tmp_path / "etc" / "sources.list.d").mkdir(parents=True)
        monkeypatch.setattr(backports, "APT_ETC", tmp_path / "etc")
        monkeypatch.setattr(backports, "_codename", lambda: "bookworm")
        monkeypatch.setattr(backports.platform, "machine", lambda: "x86_64")
        return tmp_path / "etc"

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("sources.list", "#deb http://x bookworm main\n"
             "deb [arch=amd64 signed-by=/dev/null] http://mirror.example/debian bookworm main\n"),
            ("sources.list.d/a.sources", "URIs: http://x\nSuites: else\nComponents: main\n\n"
             "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n"
             "Components: main\nSigned-By: /dev/null\n"),
        ],
        ids=["one-line", "deb822"],
    )  # fmt: skip
    def test_mirror_is_the_configured_one(self, apt, name, text):
        (apt / name).write_text(text)
        expected = ("[signed-by=/dev/null]", "http://mirror.example/debian", "bookworm")
        assert backports.configured_mirror() == expected

    def test_failure_says_why_and_leaves_nothing(self, apt, tmp_path, monkeypatch, capsys):
        (apt / "sources.list").write_text(f"deb [trusted=yes] file:{tmp_path}/none bookworm main\n")
        monkeypatch.setenv("SHARDED_PC_QEMU_CACHE", str(tmp_path / "cache"))
        assert backports.main(["fetch"]) == 1
        assert "cannot fetch a newer QEMU" in capsys.readouterr().err
        assert not list(tmp_path.glob("cache/*")) + list(tmp_path.glob("cache/.*"))

    def test_ensuring_without_a_mirror_is_no_error(self, apt, tmp_path, monkeypatch, capsys):
        (apt / "sources.list").write_text(f"deb [trusted=yes] file:{tmp_path}/none bookworm main\n")
        pretend(monkeypatch, cached=())
        monkeypatch.setenv("SHARDED_PC_QEMU_CACHE", str(tmp_path / "cache"))
        assert backports.main(["ensure"]) == 0
        _, line = capsys.readouterr().err.splitlines()
        assert line.startswith("no newer QEMU, tests that need one are skipped: E: ")

    @pytest.mark.parametrize(
        ("cached", "distribution", "fetched"),
        [([], 7, True), ([], 10, False), ([8], 7, False), ([], None, True)],
        ids=["old", "new", "cached", "none"],
    )
    def test_ensuring_fetches_once(self, monkeypatch, capsys, cached, distribution, fetched):
        pretend(monkeypatch, map(qemu, cached), distribution and qemu(distribution))
        monkeypatch.setattr(backports, "fetch", lambda: qemu(11))
        assert backports.main(["ensure"]) == 0
        assert ("\nfetched qemu-11.0.0\n" in capsys.readouterr().err) == fetched

    def test_no_mirror_is_a_failure(self, apt):
        with pytest.raises(backports.FetchError, match="no source for 'bookworm'"):
            backports.fetch()

    def test_unknown_command_is_a_usage_error(self, capsys):
        assert backports.main(["steal"]) == 2
