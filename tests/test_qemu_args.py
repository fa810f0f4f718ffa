"""A destination's command line is rewritten onto our segments, or refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sharded_pc import qemu_args
from sharded_pc.errors import UsageError
from sharded_pc.geometry import RamBlock

MIB = 1 << 20
ROMS = (RamBlock("pc.bios", 256 << 10), RamBlock("/rom@etc/acpi/tables", 128 << 10))
ONE = (RamBlock("pc.ram", 256 * MIB), *ROMS)
TWO = (RamBlock("ram0", 64 * MIB), RamBlock("ram1", 192 * MIB), *ROMS)
TWINS = (RamBlock("left", 128 * MIB), RamBlock("right", 128 * MIB), *ROMS)
QEMU = "qemu-system-x86_64"


@dataclasses.dataclass
class Made:
    """What becomes of a command line: at once, and when the source's blocks are known."""

    arguments: tuple[str, ...]
    backends: tuple[qemu_args.Backend, ...]


def plan(text: str, blocks=ONE, qemu: str = QEMU) -> Made:
    words = [*qemu.split(), *text.split()]
    own = qemu_args.backends(words)
    found = qemu_args.match(words, blocks)
    assert [(each.id, each.block.size) for each in found] == [(o.name, o.size) for o in own]
    paths = {each.name: f"/dev/shm/g.{each.name}" for each in own}
    return Made(qemu_args.plan(words, paths), found)


def backend(id_: str, mib: int, more: str = "") -> str:
    path = f"/dev/shm/g.{id_}"
    return (
        f"memory-backend-file,id={id_},size={mib * MIB}B,mem-path={path},align=2097152B,share=on,"
        f"x-use-canonical-path-for-ramblock-id=off{more}"
    )


def pairs(made: Made) -> list[tuple[str, str]]:
    return [(backend.id, backend.block.name) for backend in made.backends]


def objects(made: Made) -> list[str]:
    words = made.arguments
    return [words[at + 1] for at, word in enumerate(words) if word == "-object"]


def refusal(text: str, blocks=ONE) -> str:
    with pytest.raises(UsageError) as caught:
        plan(text, blocks)
    return str(caught.value)


class TestMainRam:
    @pytest.mark.parametrize(
        "memory",
        [
            "-m 256",
            "-m 256M",
            "-m size=256M",
            "-m 0.25G",
            "--m 256",
            "-m 256,slots=2",
            "-m size=262144k,slots=4,maxmem=1048576k",
            "-m 256 -m slots=2,maxmem=1G",
            "-machine memory.size=256M",
            "-machine memory.size=64M -m 256",
        ],
    )
    def test_plain_memory_becomes_a_shared_backend(self, memory):
        made = plan(f"{memory} -nodefaults")
        assert made.arguments[-6:] == (
            "-object",
            backend("pc.ram", 256),
            "-machine",
            "memory-backend=pc.ram",
            "-incoming",
            "defer",
        )
        assert pairs(made) == [("pc.ram", "pc.ram")]

    @pytest.mark.parametrize(
        "object_",
        [
            "memory-backend-ram,id=mem,size=256M",
            "qom-type=memory-backend-ram,id=mem,size=256M",
            "memory-backend-memfd,id=mem,size=256M,share=on",
            "memory-backend-file,id=mem,size=256M,mem-path=/elsewhere",
            "memory-backend-ram,id=mem,size=268435456",
            "memory-backend-ram,id=mem,size=0x10000000",
        ],
    )
    @pytest.mark.parametrize(
        "machine",
        [
            "-machine q35,memory-backend=mem",
            "-M memory-backend=mem -M type=q35",
            '--machine {"type":"q35","memory-backend":"mem"}',
            "-machine memory-backend=/objects/mem",
        ],
    )
    def test_a_named_backend_is_replaced_and_keeps_its_name(self, object_, machine):
        made = plan(f"{machine} -m 256 -object {object_}")
        assert objects(made) == [backend("mem", 256)]
        assert pairs(made) == [("mem", "pc.ram")]

    @pytest.mark.parametrize(
        "numa",
        [
            "-numa node,memdev=ram0 -numa node,memdev=ram1",
            "-numa node,nodeid=0,cpus=0,memdev=ram0 -numa node,nodeid=1,memdev=ram1 "
            "-numa cpu,node-id=0,socket-id=0",
            '-numa {"type":"node","memdev":"ram0"} -numa {"type":"node","memdev":"ram1"}',
        ],
    )
    def test_numa_nodes_get_a_backend_each(self, numa):
        made = plan(
            "-m 256 -object memory-backend-ram,id=ram1,size=192M "
            f"-object memory-backend-ram,id=ram0,size=64M {numa}",
            TWO,
        )
        assert pairs(made) == [("ram0", "ram0"), ("ram1", "ram1")]
        assert objects(made) == [backend("ram1", 192), backend("ram0", 64)]

    def test_the_rest_of_the_command_line_is_left_alone(self):
        given = (
            "-m 256 -S -qmp unix:q,server=on -device virtio-rng-pci -smp 2 -incoming defer "
            "--nographic -netdev tap,id=n,vhost=on -device vhost-scsi-pci,wwpn=naa.5 "
            "-device vhost-vsock-pci,guest-cid=3 -overcommit mem-lock=on-fault -name -chroot "
            "-object memory-backend-memfd,id=unused,size=1M,hugetlb=on "
            "-global migration.send-section-footer=on -run-with async-teardown=on"
        )
        made = plan(given)
        assert made.arguments[1 : 1 + len(given.split())] == tuple(given.split())
        assert made.arguments.count("-incoming") == 1


class TestProgram:
    """Words before QEMU are a wrapper's, and none of its options is QEMU's."""

    @pytest.mark.parametrize(
        "qemu",
        [
            "numactl -m 0 /usr/bin/qemu-system-x86_64",
            "taskset -daemonize qemu-kvm",
            "env -mem-path x -i kvm",
            "wrapper -object memory-backend-ram -m 1 qemu-system-x86_64.real",
            "/usr/bin/kvm",
            "sh wrapper",
            "my-qemu",
        ],
    )
    def test_is_found(self, qemu):
        blocks = (RamBlock("pc.ram", 128 * MIB), *ROMS)
        made = plan("-accel kvm -name qemu-kvm -append -daemonize", blocks, qemu=qemu)
        assert made.arguments[: len(qemu.split())] == tuple(qemu.split())
        assert pairs(made) == [("pc.ram", "pc.ram")]

    def test_options_behind_it_are_looked_at(self):
        assert "-runas" in refusal("-m 256 -runas kvm")
        with pytest.raises(UsageError, match="-daemonize"):
            plan("-daemonize", qemu="nice -n 10 qemu-system-x86_64")

    def test_no_qemu_at_all(self):
        with pytest.raises(UsageError, match="no QEMU given"):
            qemu_args.check_arguments([])


class TestMatching:
    """By name first; a size decides only what it alone can decide."""

    def nodes(self, a: str, b: str, mib: int = 128) -> str:
        """A machine of two nodes."""
        return " ".join(
            f"-object memory-backend-ram,id={id_},size={mib}M -numa node,memdev={id_}"
            for id_ in (a, b)
        )

    def test_twins_are_told_apart_by_name(self):
        made = plan(self.nodes("right", "left"), TWINS)
        assert pairs(made) == [("right", "right"), ("left", "left")]

    def test_the_other_of_two_twins(self):
        assert pairs(plan(self.nodes("other", "left"), TWINS)) == [
            ("other", "right"),
            ("left", "left"),
        ]

    def test_renamed_twins_are_refused(self):
        said = refusal(self.nodes("b", "a"), TWINS)
        assert "memory backend 'b' of 128 MiB could be the source's" in said
        assert "left 128 MiB, right 128 MiB" in said and "backend 'a' could be as well" in said
        assert "-object" in said and "id=NAME" in said

    def test_one_backend_and_two_blocks_of_its_size(self):
        said = refusal(
            "-object memory-backend-ram,id=mem,size=128M -machine memory-backend=mem", TWINS
        )
        assert "could be the source's left 128 MiB, right 128 MiB; " in said

    def test_two_backends_and_one_block_of_their_size(self):
        assert "'a' of 256 MiB could be the source's pc.ram" in refusal(self.nodes("a", "b", 256))

    def test_renamed_backends_of_different_sizes(self):
        made = plan(
            "-object memory-backend-ram,id=a,size=192M -object memory-backend-ram,id=b,size=64M "
            "-numa node,memdev=a -numa node,memdev=b",
            TWO,
        )
        assert pairs(made) == [("a", "ram1"), ("b", "ram0")]

    @pytest.mark.parametrize(
        ("machine", "id_"), [("pc", "pc.ram"), ("q35", "pc.ram"), ("microvm", "microvm.ram")]
    )
    def test_plain_memory_has_the_machines_name(self, machine, id_):
        """It is given before the source says how it calls its own."""
        blocks = (RamBlock("mem0", 256 * MIB), *ROMS)
        made = plan(f"-M {machine} -m 256", blocks)
        assert pairs(made) == [(id_, "mem0")]
        assert made.arguments[-3] == f"memory-backend={id_}"
        assert objects(made) == [backend(id_, 256)]

    def test_plain_memory_is_rounded_as_qemu_does(self):
        """parse_memory_options: to 8 KiB."""
        (own,) = qemu_args.backends([QEMU, "-m", "262145k"])
        assert own.size == 256 * MIB + 8192

    @pytest.mark.parametrize(
        ("text", "id_"),
        [
            ("-m 256", "pc.ram"),
            ("-object memory-backend-ram,id=mem0,size=256M -machine memory-backend=mem0", "mem0"),
            ("-object memory-backend-ram,id=mem,size=256M -machine memory-backend=mem", "mem"),
        ],
    )
    def test_a_block_named_by_its_path(self, text, id_):
        """Machine types before 4.0 with a file or memfd backend."""
        made = plan(text, (RamBlock("/objects/mem0", 256 * MIB), *ROMS))
        assert pairs(made) == [(id_, "/objects/mem0")]
        assert objects(made) == [backend(id_, 256)]

    def test_a_device_of_the_same_size_is_no_ram(self):
        blocks = (RamBlock("0000:00:02.0/vga.vram", 16 * MIB), RamBlock("mem", 16 * MIB), *ROMS)
        assert pairs(plan("-m 16", blocks)) == [("pc.ram", "mem")]

    def test_a_block_of_a_private_backend_is_not_taken(self):
        blocks = (RamBlock("nv", 64 * MIB), RamBlock("mem", 64 * MIB), *ROMS)
        made = plan(
            "-m 64 -object memory-backend-ram,id=nv,size=64M -device nvdimm,memdev=nv", blocks
        )
        assert pairs(made) == [("pc.ram", "mem")]

    def test_the_right_name_and_another_size(self):
        said = refusal(
            "-object memory-backend-ram,id=pc.ram,size=64M -machine memory-backend=pc.ram"
        )
        assert "'pc.ram' of 64 MiB fits no RAM block of the source (pc.ram 256 MiB, " in said


class TestDimms:
    BLOCKS = (*ONE, RamBlock("dimm0", 128 * MIB), RamBlock("dimm1", 128 * MIB))

    @pytest.mark.parametrize(
        "kind",
        [
            "memory-backend-ram",
            "memory-backend-memfd",
            "memory-backend-shm",
            "memory-backend-file,mem-path=/f,share=on",
        ],
    )
    @pytest.mark.parametrize(
        "device",
        [
            "-device pc-dimm,memdev=dimm1,id=d",
            "--device driver=pc-dimm,memdev=dimm1",
            '-device {"driver":"pc-dimm","memdev":"dimm1"}',
        ],
    )
    def test_become_segments(self, kind, device):
        given = f"-m 256,slots=2,maxmem=1G -object {kind},id=dimm1,size=128M {device}"
        made = plan(given, self.BLOCKS)
        assert pairs(made) == [("pc.ram", "pc.ram"), ("dimm1", "dimm1")]
        assert backend("dimm1", 128) in objects(made)

    def test_behind_the_machines_own_backend(self):
        made = plan(
            "-object memory-backend-ram,id=dimm0,size=128M -device pc-dimm,memdev=dimm0 "
            "-object memory-backend-ram,id=mem,size=256M -machine memory-backend=mem",
            self.BLOCKS,
        )
        assert pairs(made) == [("mem", "pc.ram"), ("dimm0", "dimm0")]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("-device pc-dimm,memdev=gone", "'gone' has no -object"),
            (
                "-object memory-backend-ram,id=x,size=128M -device pc-dimm,memdev=x",
                "could be the source's dimm0 128 MiB, dimm1 128 MiB",
            ),
            (
                "-object memory-backend-memfd,id=dimm0,size=128M,hugetlb=on "
                "-device pc-dimm,memdev=dimm0",
                "hugetlb=on of memory backend 'dimm0'",
            ),
        ],
    )
    def test_refused(self, text, says):
        assert says in refusal(f"-m 256 {text}", self.BLOCKS)


class TestSharedElsewhere:
    """A shared backend that is no segment would be left out of QEMU's stream."""

    @pytest.mark.parametrize(
        "kind",
        [
            "memory-backend-memfd",
            "memory-backend-shm",
            "memory-backend-file,mem-path=/f,share=on",
            "memory-backend-ram,share=y",
            "memory-backend-ram,share",
        ],
    )
    @pytest.mark.parametrize(
        "device",
        [
            "nvdimm,memdev=x",
            "virtio-pmem-pci,memdev=x",
            '{"driver":"virtio-pmem-pci","memdev":"x"}',
            "cxl-type3,persistent-memdev=x",
            "something,memdev=x",
        ],
    )
    def test_is_refused(self, kind, device):
        said = refusal(f"-m 256 -object {kind},id=x,size=1M -device {device}")
        assert "on the shared memory backend 'x'" in said and "share=off" in said
        assert ("stay in its file" in said) == ("nvdimm" in device or "pmem" in device)

    @pytest.mark.parametrize(
        "kind",
        [
            "memory-backend-ram",
            "memory-backend-memfd,share=off",
            "memory-backend-memfd,noshare",
            "memory-backend-file,mem-path=/f",
        ],
    )
    def test_a_private_one_is_left_alone(self, kind):
        given = f"-m 256 -object {kind},id=x,size=1M -device nvdimm,memdev=x".split()
        assert list(plan(" ".join(given)).arguments[1 : 1 + len(given)]) == given


class TestProperties:
    """Of a backend that moves: kept in the syntax they came in, replaced, or refused."""

    def test_kept(self):
        kept = "host-nodes=0-1,host-nodes=3,policy=bind,merge=off,dump=off,reserve=no"
        made = plan(
            f"-machine memory-backend=m -object memory-backend-ram,id=m,{kept},size=256M,"
            "prealloc=off,prealloc-threads=4,align=1G,share=off"
        )
        assert objects(made) == [backend("m", 256, f",{kept}")]

    def test_kept_in_json(self):
        given = {
            "qom-type": "memory-backend-memfd", "id": "m", "size": 256 * MIB,
            "host-nodes": [0, 1], "policy": "bind", "dump": False, "seal": True,
            "prealloc": False, "x-use-canonical-path-for-ramblock-id": False,
        }  # fmt: skip
        made = plan(f"-machine memory-backend=m -object {json.dumps(given, separators=(',', ':'))}")
        (word,) = objects(made)
        assert json.loads(word) == {
            "qom-type": "memory-backend-file", "id": "m", "size": 256 * MIB,
            "mem-path": "/dev/shm/g.m", "align": 2 * MIB, "share": True,
            "x-use-canonical-path-for-ramblock-id": False,
            "host-nodes": [0, 1], "policy": "bind", "dump": False,
        }  # fmt: skip

    @pytest.mark.parametrize(
        "given", ["readonly=off", "rom=auto", "pmem=no", "hugetlb=n", "offset=0", "discard-data=on"]
    )
    def test_what_is_off_may_be_there(self, given):
        made = plan(
            f"-machine memory-backend=m -object memory-backend-file,mem-path=/f,id=m,size=256M,"
            f"{given}"
        )
        assert objects(made) == [backend("m", 256)]

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ("prealloc=on", "prealloc=on of memory backend 'm': the RAM arrives on demand"),
            ("prealloc", "prealloc=on of memory backend 'm'"),
            ("readonly=y", "readonly=on of"),
            ("rom=on", "rom=on of"),
            ("pmem=true", "pmem=on of"),
            ("hugetlb=yes", "hugetlb=on of"),
            ("hugetlbsize=2M", "hugetlbsize of memory backend 'm': expected normal pages"),
            ("offset=4K", "offset=4K of"),
            ("x-use-canonical-path-for-ramblock-id=on", "finds the source's block /objects/ID"),
            ("novelty=3", "property novelty of memory backend 'm' is not known here"),
        ],
    )
    def test_refused(self, given, says):
        said = refusal(
            f"-machine memory-backend=m -object memory-backend-file,mem-path=/f,id=m,size=256M,"
            f"{given}"
        )
        assert says in said

    def test_refused_in_json(self):
        given = '{"qom-type":"memory-backend-ram","id":"m","size":268435456,"prealloc":true}'
        assert "prealloc=on" in refusal(f"-machine memory-backend=m -object {given}")
