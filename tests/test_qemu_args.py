"""A destination's command line is rewritten onto our segments, or refused by name."""

from __future__ import annotations

import pytest

from sharded_pc import qemu_args
from sharded_pc.errors import UsageError
from sharded_pc.geometry import RamBlock

MIB = 1 << 20
ROMS = (RamBlock("pc.bios", 256 << 10), RamBlock("/rom@etc/acpi/tables", 128 << 10))
ONE = (RamBlock("pc.ram", 256 * MIB), *ROMS)
TWO = (RamBlock("ram0", 64 * MIB), RamBlock("ram1", 192 * MIB), *ROMS)
QEMU = "qemu-system-x86_64"


def plan(text: str, blocks=ONE) -> qemu_args.Plan:
    paths = {block.name: f"/dev/shm/g.{block.name}" for block in blocks}
    return qemu_args.plan([QEMU, *text.split()], blocks, paths)


def backend(id_: str, mib: int, block: str | None = None) -> str:
    path = f"/dev/shm/g.{block or id_}"
    return f"memory-backend-file,id={id_},size={mib * MIB}B,mem-path={path},align=2097152B,share=on"


@pytest.mark.parametrize(
    "memory", ["-m 256", "-m 256M", "-m size=256M", "-m 0.25G", "-m 256,slots=2"]
)
def test_plain_memory_becomes_a_shared_backend(memory):
    made = plan(f"{memory} -nodefaults")
    assert made.arguments[-6:] == (
        "-object",
        backend("pc.ram", 256),
        "-machine",
        "memory-backend=pc.ram",
        "-incoming",
        "defer",
    )
    assert [(b.id, b.block.name, b.address) for b in made.backends] == [("pc.ram", "pc.ram", 0)]


@pytest.mark.parametrize(
    "object_",
    [
        "memory-backend-ram,id=mem,size=256M",
        "memory-backend-memfd,id=mem,size=256M,share=on",
        "memory-backend-file,id=mem,size=256M,mem-path=/elsewhere",
        '{"qom-type":"memory-backend-ram","id":"mem","size":268435456}',
        "memory-backend-ram,id=mem,size=268435456",
    ],
)
def test_a_named_backend_is_replaced_and_keeps_its_name(object_):
    made = plan(f"-machine q35,memory-backend=mem -m 256 -object {object_}")
    assert backend("mem", 256, "pc.ram") in made.arguments
    assert object_ not in made.arguments
    assert made.backends[0].block.name == "pc.ram"
    assert made.arguments.count("-object") == 1


def test_numa_nodes_get_a_backend_each_at_their_address():
    made = plan(
        "-m 256 -object memory-backend-ram,id=ram1,size=192M "
        "-object memory-backend-ram,id=ram0,size=64M "
        "-numa node,memdev=ram0 -numa node,memdev=ram1",
        TWO,
    )
    assert [(b.id, b.address) for b in made.backends] == [("ram0", 0), ("ram1", 64 * MIB)]
    assert backend("ram0", 64) in made.arguments and backend("ram1", 192) in made.arguments


def test_the_rest_of_the_command_line_is_left_alone():
    given = (
        "-m 256 -S -qmp unix:q,server=on -device virtio-rng-pci -smp 2 -incoming defer --nographic"
    )
    made = plan(given)
    assert made.arguments[1 : 1 + len(given.split())] == tuple(given.split())
    assert made.arguments.count("-incoming") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("-m 128", "128 MiB fits no RAM block of the source (pc.ram 256 MiB"),
        ("", "128 MiB fits no RAM block"),
        ("-m lots", "memory size 'lots'"),
        ("-m 256 -daemonize", "must stay this command's child"),
        ("-m 256 --daemonize", "must stay this command's child"),
        ("-m 256 -incoming tcp:0:4444", "comes through this receiver"),
        ("-m 256 -mem-path /dev/hugepages", "-mem-path"),
        ("-m 256 -mem-prealloc", "-mem-prealloc"),
        ("-m 256 -overcommit mem-lock=on", "mem-lock=on"),
        ("-m 256 -device vfio-pci,host=01:00.0", "vfio-pci"),
        ('-m 256 -device {"driver":"vfio-pci"}', "vfio-pci"),
        ("-m 256 -machine memory-backend=none", "no -object of that id"),
        (
            "-m 256 -machine memory-backend=m "
            "-object memory-backend-memfd,id=m,size=256M,hugetlb=on",
            "hugetlb=on",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(text, says):
    with pytest.raises(UsageError) as caught:
        plan(text)
    assert says in str(caught.value)


def test_no_qemu_at_all():
    with pytest.raises(UsageError, match="no QEMU given"):
        qemu_args.check_arguments([])


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("memory-backend-ram,id=a", {"": "memory-backend-ram", "id": "a"}),
        ("q35,smm", {"": "q35", "smm": "on"}),
        ("type=q35,file=a,,b", {"type": "q35", "file": "a,b"}),
        ("path=,,x,,", {"path": ",x,"}),
    ],
)
def test_options(text, options):
    assert qemu_args.split_options(text) == options
    assert qemu_args.split_options(qemu_args.join_options(options)) == options
