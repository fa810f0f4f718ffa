"""``sharded-pc run`` with the devices, options and machine types of docs/compatibility.md.

Many in one guest: what one of them does to the RAM, or to the stream, does not hide another's. A
device that is new in some QEMU is left out of it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qemu.qmp", reason="needs the client: pip install qemu.qmp")

from tests.qemu.backports import NEWER, QemuBinary
from tests.qemu.guest_image import MIB, write_image
from tests.test_run_qemu import check_whole, pair

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(90)]


def null_disk(node: str) -> tuple[str, ...]:
    return ("-blockdev", f"driver=null-co,node-name={node},size=1048576,read-zeroes=on")


def devices(*values: str) -> tuple[str, ...]:
    return tuple(word for value in values for word in ("-device", value))


def cards(*values: str) -> tuple[str, ...]:
    """Network cards, each with a network of its own and without a ROM for booting."""
    words: list[str] = []
    for number, value in enumerate(values):
        words += ["-netdev", f"hubport,id=net{number},hubid={number}"]
        words += devices(f"{value},netdev=net{number},romfile=")
    return tuple(words)


DISKS = (
    *(word for node in ("d0", "d1", "d2", "d3", "d4") for word in null_disk(node)),
    "-object", "iothread,id=thread0",
    *devices(
        "virtio-blk-pci,drive=d0,iothread=thread0",
        "virtio-scsi-pci,id=scsi", "scsi-hd,drive=d1,bus=scsi.0",
        "ich9-ahci,id=ahci", "ide-hd,drive=d3,bus=ahci.0", "ide-cd,drive=d4,bus=ahci.1",
        "qemu-xhci,id=xhci", "usb-storage,drive=d2,bus=xhci.0", "usb-tablet,bus=xhci.0",
    ),
)  # fmt: skip
CARDS = cards("virtio-net-pci,mq=on,vectors=4", "e1000e", "e1000", "rtl8139", "vmxnet3", "pcnet")
SCREENS = (
    "-vga", "cirrus",
    *devices("bochs-display", "secondary-vga", "virtio-gpu-pci", "ramfb"),
)  # fmt: skip
REST = (
    "-chardev", "null,id=console0",
    "-audiodev", "none,id=sound0",
    *devices(
        "virtio-serial-pci", "virtconsole,chardev=console0",
        "virtio-keyboard-pci", "virtio-tablet-pci", "virtio-iommu-pci",
        "pcie-root-port,id=port0,chassis=1", "virtio-rng-pci,bus=port0",
        "intel-hda", "hda-duplex,audiodev=sound0", "AC97,audiodev=sound0",
        "pvpanic", "i6300esb", "edu", "vmgenid", "vmcoreinfo", "ipmi-bmc-sim,id=bmc",
        "isa-ipmi-kcs,bmc=bmc",
    ),
)  # fmt: skip
GROUPS = {
    "disks": ("pc", DISKS),
    "cards": ("pc", CARDS),
    "screens": ("pc", SCREENS),
    "rest": ("q35", REST),
    "iommu": ("q35", devices("intel-iommu")),
}


MEMORY_MIB = 66


def check(folder: Path, name: str, binary: QemuBinary, **both: Any) -> None:
    """A whole migration of a guest that jumps about in 1..65 MiB.

    It leaves the last MiB alone: the firmware's virtqueues are there, and a destination refuses a
    device whose queue has been overwritten.
    """
    writes = binary.version >= NEWER
    write_image(folder / "guest.img", MEMORY_MIB, writes=writes, scattered=True)
    with pair(folder, name, binary, memory_mib=MEMORY_MIB, **both) as vms:
        check_whole(vms, MEMORY_MIB * MIB)


@pytest.mark.parametrize(("machine", "extra"), GROUPS.values(), ids=GROUPS)
def test_devices(tmp_path, unique_name, binary, machine, extra):
    check(tmp_path, unique_name, binary, machine=machine, extra=extra)


def test_shared_folder(tmp_path, unique_name, binary):
    """virtio-9p, not mounted: QEMU blocks the migration of a mounted one."""
    fsdev = ("-fsdev", f"local,id=fs0,path={tmp_path},security_model=none")
    extra = (*fsdev, *devices("virtio-9p-pci,fsdev=fs0,mount_tag=share"))
    check(tmp_path, unique_name, binary, extra=extra)


def options(folder: Path, side: str) -> tuple[str, ...]:
    """Options of many kinds; each side has its own sockets and files."""
    own = f"{folder}/{side}"
    return (
        "-cpu", "max", "-smp", "4,sockets=2,cores=2,threads=1",
        "-m", f"{MEMORY_MIB},slots=2,maxmem=1G",
        "-rtc", "base=utc,clock=vm,driftfix=slew", "-boot", "order=c,menu=off,strict=on",
        "-vnc", f"unix:{own}.vnc", "-monitor", f"unix:{own}.hmp,server=on,wait=off",
        "-chardev", f"socket,id=mon1,path={own}.qmp1,server=on,wait=off",
        "-mon", "chardev=mon1,mode=control",
        "-gdb", f"unix:{own}.gdb,server=on,wait=off",
        "-pidfile", f"{own}.pid", "-D", f"{own}.log", "-d", "guest_errors",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-name", "guest=a guest,debug-threads=on", "-uuid", "11111111-2222-3333-4444-555555555555",
        "-msg", "timestamp=on", "-global", "PIIX4_PM.disable_s3=1",
        "-machine", "usb=off,dump-guest-core=off,mem-merge=off,hpet=off,vmport=off",
        "-bios", "bios-256k.bin", "-L", str(folder),
        "-smbios", "type=1,manufacturer=somebody", "-fw_cfg", "name=opt/org.x/y,string=z",
        "-no-reboot", "-no-shutdown", "-action", "panic=pause", "-k", "de",
        "-overcommit", "mem-lock=off", "-only-migratable",
        "-object", "secret,id=secret0,data=abcd",
        "-trace", "enable=migrate_*",
    )  # fmt: skip


def test_options(tmp_path, unique_name, binary):
    extra, differing = options(tmp_path, "s"), {"extra": options(tmp_path, "d")}
    check(tmp_path, unique_name, binary, extra=extra, differing=differing)
    assert (tmp_path / "d.log").exists()


def test_single_threaded_tcg(tmp_path, unique_name, binary):
    accel = {"accel": "tcg,thread=single,tb-size=32"}
    check(tmp_path, unique_name, binary, smp=2, **accel)


MACHINES = (
    "pc-i440fx-7.2", "pc-q35-6.2", "pc-q35-5.1", "pc-i440fx-4.0", "pc-i440fx-3.1", "pc-q35-2.12",
    "pc-i440fx-2.8", "isapc",
)  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
def test_machine_type(tmp_path, unique_name, binary, machine):
    if machine not in machine_types(binary):
        pytest.skip(f"n/a: {binary} has no {machine}")
    check(tmp_path, unique_name, binary, machine=machine)


def test_microvm(tmp_path, unique_name, newer):
    """It boots from virtio-mmio; a firmware that can do so came with the newer QEMU."""
    drive = f"if=none,id=boot,file={tmp_path}/guest.img,format=raw,file.locking=off"
    modern = ("-global", "virtio-mmio.force-legacy=false")
    extra = (*modern, "-drive", drive, *devices("virtio-blk-device,drive=boot"))
    check(tmp_path, unique_name, newer, machine="microvm", image=None, extra=extra)


def machine_types(binary: QemuBinary) -> set[str]:
    command = [*binary.command(), "-machine", "help"]
    said = subprocess.run(
        command, env=binary.full_environment(), capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[0] for line in said.splitlines() if line.strip()}
