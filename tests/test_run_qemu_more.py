"""``sharded-pc run`` when something is wrong: one clear error, its exit code, nothing left behind;
and the README's migration as it is written there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu import TIMEOUT_S, wait_until
from tests.qemu.backports import TRIPLET, distribution_qemu
from tests.qemu.vm import QemuVm
from tests.receiver import Outcome, describe
from tests.runner import Destination, Runner
from tests.test_receive_qemu import begin_precopy, switch
from tests.test_run_qemu import check_goes_on, pair

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90)]

SHORT = """import sys
from sharded_pc import cli, destination
destination.START_SECONDS = 1
sys.exit(cli.main())
"""
README = Path(__file__).parents[1] / "README.md"


def check_error(outcome: Outcome, code: int, pattern: str) -> None:
    assert outcome.exit_code == code, outcome.stderr
    assert len(outcome.errors) == 1, outcome.stderr
    assert re.search(pattern, outcome.errors[0]), outcome.stderr


def check_source_runs(source: QemuVm) -> None:
    """The migration has failed for it, its guest goes on there."""
    source.wait_migration("failed")
    check_goes_on_at(source)


def check_goes_on_at(source: QemuVm) -> None:
    source.wait_until(lambda: source.run_state() == "running", "the guest running again")
    source.wait_passes()
    assert source.wrong_words() == []


class TestBeforeASource:
    @pytest.mark.parametrize(
        ("arguments", "code", "pattern"),
        [
            (["/nowhere/qemu"], 3, "QEMU '/nowhere/qemu' is not there"),
            (["qemu", "-daemonize"], 2, "-daemonize"),
            (["qemu", "-mem-path", "/x"], 2, "-mem-path"),
            (["qemu", "-incoming", "tcp:0:1"], 2, "-incoming tcp:0:1"),
            (["qemu", "-device", "vfio-pci,host=1"], 2, "vfio-pci"),
            (["qemu", "-machine", "memory-backend=none"], 2, "'none' has no -object"),
            ([], 2, "no QEMU given"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_refused(self, tmp_path, unique_name, arguments, code, pattern):
        with closing(Runner(tmp_path, unique_name, arguments)) as runner:
            outcome = runner.run_to_end()
        check_error(outcome, code, pattern)
        assert "listening" not in outcome.stderr

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal(self, tmp_path, unique_name, number):
        binary = distribution_qemu()
        if binary is None:
            pytest.skip("no QEMU")
        guest = Destination(tmp_path, "dst", binary=binary, memory_mib=64)
        with Runner(tmp_path, unique_name, guest) as runner:
            runner.signal(number)
            assert runner.finish().exit_code == 128 + number

    def test_signal_while_qemu_starts(self, tmp_path, unique_name):
        """A stand-in for a QEMU that hangs as it starts: nobody waits for its time limit."""
        hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
        with closing(Runner(tmp_path, unique_name, hangs)) as runner:
            began = time.monotonic()
            runner.spawn()
            wait_until(
                lambda: len(stand_ins(runner)) == 2, "the stand-in"
            )  # and who is to start it
            runner.signal(signal.SIGTERM)
            assert runner.finish().exit_code == 128 + signal.SIGTERM
        assert time.monotonic() - began < 10


class TestStarting:
    """QEMU is up before a source may connect; what is wrong with it is told then."""

    def test_is_up(self, tmp_path, unique_name, binary):
        """Its RAM is registered, and its vCPUs are there: nothing of a source is known."""
        guest = Destination(tmp_path, "dst", binary=binary, memory_mib=64, smp=2)
        with Runner(tmp_path, unique_name, guest) as runner:
            guest.start()
            assert guest.run_state() == "inmigrate"
            assert len(guest.qmp("query-cpus-fast")) == 2
            assert guest.registered_bytes() == 64 << 20
            assert runner.look()["status"] == "setup"
            runner.signal(signal.SIGTERM)
            assert runner.finish().exit_code == 128 + signal.SIGTERM

    def test_bad_option(self, tmp_path, unique_name, binary):
        guest = Destination(tmp_path, "dst", binary=binary, memory_mib=64, extra=["-device", "bad"])
        with closing(Runner(tmp_path, unique_name, guest)) as runner:
            outcome = runner.run_to_end()
        check_error(outcome, 1, "QEMU exited with 1 before")
        assert "'bad' is not a valid device model" in outcome.stderr

    def test_not_a_program(self, tmp_path, unique_name):
        program = tmp_path / "qemu"
        program.write_text("not a program\n")
        program.chmod(0o755)
        check_stand_in(tmp_path, unique_name, [str(program)], 3, "Exec format error")

    def test_never_maps_its_memory(self, tmp_path, unique_name):
        """A stand-in for a QEMU that hangs as it starts; the time limit is shortened."""
        hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
        program = (sys.executable, "-c", SHORT)
        pattern = "QEMU did not open its monitor within 1 s"
        check_stand_in(tmp_path, unique_name, hangs, 1, pattern, program=program)

    def test_a_shell_that_ends_first(self, tmp_path, unique_name, binary):
        """As -daemonize: nobody would be QEMU's parent."""
        guest = Destination(tmp_path, "dst", binary=binary, memory_mib=64)
        guest.front = ("sh", "-c", '"$0" "$@" & exit 0')
        with closing(Runner(tmp_path, unique_name, guest)) as runner:
            outcome = runner.run_to_end()
        check_error(outcome, 1, "QEMU exited with 0 before it could open its monitor")

    def test_without_the_preload_library(self, tmp_path, unique_name):
        """A set-group-ID copy of the distribution's QEMU: the loader ignores LD_PRELOAD there."""
        binary = distribution_qemu()
        if binary is None:
            pytest.skip("no QEMU")
        program = tmp_path / "qemu-setgid"
        shutil.copy(binary.path, program)
        others = {*os.getgroups(), 65534} - {os.getegid()}
        try:
            os.chown(program, -1, others.pop())
            program.chmod(0o2755)
        except (OSError, KeyError):
            pytest.skip("n/a: needs a second group to make a set-group-ID program")
        arguments = [str(program), "-L", "/usr/share/qemu", "-L", "/usr/share/seabios"]
        arguments += ["-accel", "tcg", "-nodefaults", "-display", "none"]
        modules = {"QEMU_MODULE_DIR": f"/usr/lib/{TRIPLET}/qemu"}
        pattern = "QEMU runs without the preload library"
        check_stand_in(tmp_path, unique_name, arguments, 1, pattern, environment=modules)


def stand_ins(runner: Runner) -> list[str]:
    return [line for line in describe(runner.processes()) if "sleep(60)" in line]


VGA = ("-device", "VGA,vgamem_mb=16")


class TestBeforeTheSwitch:
    """The source's guest goes on."""

    @pytest.mark.parametrize(
        ("theirs", "ours", "pattern"),
        [
            (VGA, (), r"fit the source: it has no RAM block '.*vga.vram' \(16 MiB\)"),
            (VGA, ("-device", "VGA,vgamem_mb=32"), "'.*vga.vram' has 32 MiB, the source's 16 MiB"),
        ],
        ids=["none", "other-size"],
    )
    def test_blocks(self, tmp_path, unique_name, binary, theirs, ours, pattern):
        """QEMU would find out when the source's guest has stopped."""
        differing = {"extra": ours}
        with pair(tmp_path, unique_name, binary, differing=differing, extra=theirs) as vms:
            begin_precopy(vms.source, vms.runner.uri())
            check_error(vms.runner.finish(), 2, pattern)
            check_source_runs(vms.source)

    @pytest.mark.parametrize(
        ("differing", "code", "pattern"),
        [
            ({"machine": "q35"}, 2, "machine type is pc-q35-.* the source's pc-i440fx-"),
            ({"memory_mib": 96}, 2, r"RAM .* of 96 MiB fits no .*pc.ram 64 MiB"),
        ],
        ids=["machine", "memory-size"],
    )
    def test_arguments(self, tmp_path, unique_name, binary, differing, code, pattern):
        with pair(tmp_path, unique_name, binary, differing=differing) as vms:
            begin_precopy(vms.source, vms.runner.uri())
            check_error(vms.runner.finish(), code, pattern)
            check_source_runs(vms.source)

    def test_source_killed(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.precopy()
            vms.source.kill()
            check_error(vms.runner.finish(), 4, "source closed the stream before")

    def test_qemu_killed(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.precopy()
            os.kill(vms.guest.pid, signal.SIGKILL)
            check_error(vms.runner.finish(), 1, "killed by signal 9 before")
            check_source_runs(vms.source)

    def test_receiver_killed(self, tmp_path, unique_name, binary):
        """Nobody could go on with this QEMU: it ends as well, the source's guest goes on."""
        with pair(tmp_path, unique_name, binary) as vms:
            vms.precopy()
            qemu = Path(f"/proc/{vms.guest.pid}/stat")
            os.kill(vms.runner.pid, signal.SIGKILL)
            wait_until(lambda: not qemu.exists() or ") Z " in qemu.read_text(), "QEMU's end")
            check_source_runs(vms.source)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal(self, tmp_path, unique_name, binary, number):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.precopy()
            vms.runner.signal(number)
            assert vms.runner.finish().exit_code == 128 + number
            check_source_runs(vms.source)


def check_stand_in(folder, name, arguments, code, pattern, **options) -> None:
    """The receiver ends because of what was given as QEMU, and nobody was told to connect."""
    with closing(Runner(folder, name, [*arguments, "-m", "64"], **options)) as runner:
        outcome = runner.run_to_end()
    check_error(outcome, code, pattern)
    assert "listening" not in outcome.stderr


SHELL = ("sh", "-c", '"$0" "$@"; exit $?')


class TestBehindAShell:
    """QEMU itself is ended, and the shell with it."""

    def test_failure(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary, front=SHELL) as vms:
            vms.resume()
            vms.source.kill()
            check_error(vms.runner.give_up(), 5, "connection to the source was lost")

    def test_signal_afterwards(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary, front=SHELL) as vms:
            vms.resume()
            vms.complete()
            check_goes_on(vms, 1)
            vms.runner.signal(signal.SIGTERM)
            assert vms.runner.finish().exit_code == 143

    def test_killed(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary, front=SHELL) as vms:
            vms.resume()
            os.kill(vms.guest.pid, signal.SIGKILL)
            check_error(vms.runner.finish(), 6, "exited with 137 while pages were missing")

    def test_killed_while_the_shell_lives_on(self, tmp_path, unique_name, binary):
        """It is QEMU that counts, not what stands in front of it."""
        os.mkfifo(tmp_path / "fifo")
        front = ("sh", "-c", f'"$0" "$@"; read word <{tmp_path}/fifo; exit 0')
        with pair(tmp_path, unique_name, binary, front=front) as vms:
            vms.resume()
            os.kill(vms.guest.pid, signal.SIGKILL)
            check_error(vms.runner.finish(), 6, "ended while pages were missing")


class TestWhilePagesAreMissing:
    def test_qemu_killed(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.resume()
            os.kill(vms.guest.pid, signal.SIGKILL)
            check_error(vms.runner.finish(), 6, "killed by signal 9 while pages were missing")
            vms.source.wait_migration("postcopy-paused")  # it does not wait for this receiver

    def test_qemu_quits(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.resume()
            vms.guest.qmp("quit")
            check_error(vms.runner.finish(), 6, "exited with 0 while pages were missing")

    def test_source_killed(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.resume()
            vms.source.kill()
            check_error(vms.runner.give_up(), 5, r"connection to the source was lost .* \d+ pages")

    def test_other_devices(self, tmp_path, unique_name, binary):
        """QEMU alone can tell, and only when the source's guest has stopped for good."""
        both, differing = {"extra": ("-device", "virtio-rng-pci")}, {"extra": ()}
        with pair(tmp_path, unique_name, binary, differing=differing, **both) as vms:
            vms.precopy()
            switch(vms.source)
            outcome = vms.runner.finish()
            check_error(outcome, 1, "QEMU .*device state.*message stands above")
            assert "Unknown savevm section or instance '0000:00:02.0/virtio-rng'" in outcome.stderr
            vms.source.wait_migration("postcopy-paused", "failed")  # failed since QEMU 10.2

    @pytest.mark.parametrize("postcopy", [False, True], ids=["plain", "advised"])
    def test_other_devices_in_precopy(self, tmp_path, unique_name, binary, postcopy):
        both, differing = {"extra": ("-device", "virtio-rng-pci")}, {"extra": ()}
        with pair(tmp_path, unique_name, binary, differing=differing, **both) as vms:
            vms.precopy(postcopy=postcopy)
            vms.source.set_parameters(max_bandwidth=0, downtime_limit=2000)
            check_error(vms.runner.finish(), 1, "QEMU .*device state.*message stands above")
            if postcopy:
                check_source_runs(vms.source)
            else:  # nobody has asked for a return path, so it takes the end of the stream for good
                vms.source.wait_migration("completed")
                vms.source.qmp("cont")
                check_goes_on_at(vms.source)


class TestAfterwards:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal(self, tmp_path, unique_name, binary, number):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.resume()
            vms.complete()
            check_goes_on(vms, 1)
            vms.runner.signal(number)
            assert vms.runner.finish().exit_code == 128 + number

    def test_qemu_killed(self, tmp_path, unique_name, binary):
        with pair(tmp_path, unique_name, binary) as vms:
            vms.resume()
            vms.complete()
            os.kill(vms.guest.pid, signal.SIGKILL)
            assert vms.runner.finish().exit_code == 128 + signal.SIGKILL


class TestReadme:
    """Its second section, word for word; only /tmp is another folder."""

    def test_commands(self, tmp_path):
        if distribution_qemu() is None:
            pytest.skip("no QEMU")
        section = README.read_text().split("## A QEMU guest goes on here")[1].split("\n## ")[0]
        source, destination, migrate = re.findall(r"^```\n(.*?)^```", section, re.M | re.S)
        (end,) = re.findall(r"`(kill (?:%1 )?%2)`", section)
        folder = tmp_path / "t"
        folder.mkdir()
        begin = ["set -m", source, wait_for("/tmp/source.qmp")]
        receive = [destination, wait_for("/tmp/migration"), migrate]
        leave = ["sleep 1", end, "wait %2", "echo ended $?"]
        script = "\n".join([*begin, *receive, *leave]).replace("/tmp/", f"{folder}/")
        bin_folder = str(Path(sys.executable).parent)
        done = subprocess.run(
            ["bash", "-c", script.replace(".venv/bin", bin_folder)],
            cwd=README.parent, capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert "source: completed\n" in done.stdout, done
        assert "ended 143\n" in done.stdout, done


def wait_for(path: str) -> str:
    return f"until [ -S {path} ]; do sleep 0.1; done"
