"""What a destination QEMU cannot have here is refused by its name, before a source connects."""

from __future__ import annotations

import pytest

from sharded_pc import qemu_args
from sharded_pc.errors import UsageError
from sharded_pc.qemu_args import refusals, syntax

QEMU = "qemu-system-x86_64"


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        qemu_args.check_arguments([QEMU, *text.split()])
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("-m lots", "memory size 'lots'"),
        ("-daemonize", "must stay this command's child"),
        ("--daemonize", "must stay this command's child"),
        ("-preconfig", "must reach its incoming migration by itself"),
        ("-loadvm here", "the guest's state comes from the source"),
        ("-readconfig x.cfg", "put its options on the command line"),
        ("-incoming tcp:0:4444", "comes through this receiver"),
        ("-mem-path /dev/hugepages", "-mem-path"),
        ("-mem-prealloc", "-mem-prealloc"),
        ("-runas nobody", "-runas: QEMU opens its userfaultfd as the receiver's user"),
        ("-chroot /x", "-chroot"),
        ("-run-with user=nobody", "user=nobody: QEMU opens its userfaultfd"),
        ("-run-with async-teardown=on,chroot=/x", "chroot=/x"),
        ("-machine memory-backend=none", "no -object of that id"),
        ("-machine pc,aux-ram-share=yes", "aux-ram-share=on"),
        ('-machine {"type":"pc","aux-ram-share":true}', "aux-ram-share=on"),
        ("-M x-remote", "QEMU machine x-remote"),
        ("-m 64 -machine type=x-remote", "QEMU machine x-remote"),
        ("-device {'driver':1}", "is not JSON"),
        ('-blockdev {"a":' + '{"a":' * 300 + "1" + "}" * 301, "nested more than 256 deep"),
        ('-device {"driver":' + "[" * 300 + "]" * 300 + "}", "nested more than 256 deep"),
        ('-device {"driver":' + "[" * 5000 + "]" * 5000 + "}", "nested more than 256 deep"),
        ('-machine {"memory-backend":7}', "'7' has no -object of that id"),
        ('-machine {"memory-backend":["a"]}', "no -object of that id"),
        ('-numa {"type":"node","memdev":{"a":1}}', "no -object of that id"),
        ("-m " + "9" * 400, "expected a number such as"),
        ("-m 0x" + "9" * 400, "expected a number such as"),
        ("-m 8388608T", "expected a number such as"),
        ("-m \u0662G", "expected a number such as"),
        ("-netdev passt,id=n,vhost-user=on", "netdev vhost-user: its back-end maps the RAM"),
        ("-device pvrdma", "QEMU device pvrdma"),
    ],
)
def test_options(text, says):
    assert says in refusal(text)


@pytest.mark.parametrize("word", ["on", "yes", "true", "y"])
def test_locked_memory(word):
    assert f"mem-lock={word}: " in refusal(f"-overcommit cpu-pm=on,mem-lock={word}")


@pytest.mark.parametrize("word", ["off", "no", "false", "n", "on-fault"])
def test_memory_that_is_not_locked(word):
    qemu_args.check_arguments([QEMU, "-overcommit", f"mem-lock={word}"])


@pytest.mark.parametrize(
    "text",
    [
        "migration.x-ignore-shared=on",
        "migration.x-postcopy-ram=on",
        "migration.multifd=on",
        "driver=migration,property=x-events,value=on",
    ],
)
def test_capabilities(text):
    said = refusal(f"-global {text}")
    assert "migration." in said and "the receiver sets" in said


@pytest.mark.parametrize("option", ["-device", "--device"])
@pytest.mark.parametrize("form", ["{},id=x", "id=x,driver={}", '{{"driver":"{}","id":"x"}}'])
@pytest.mark.parametrize(
    ("driver", "why"),
    [
        ("vhost-user-blk-pci", "without a userfaultfd and would read zeros"),
        ("vhost-user-fs-pci", "without a userfaultfd"),
        ("vhost-user-vga", "without a userfaultfd"),
        ("vhost-vdpa-device-pci", "without a userfaultfd"),
        ("x-pci-proxy-dev", "without a userfaultfd"),
        ("vfio-pci", "cannot wait for a page"),
        ("vfio-pci-nohotplug", "cannot wait"),
        ("vfio-ap", "cannot wait"),
        ("vfio-ccw", "cannot wait"),
        ("vfio-user-pci", "cannot wait"),
        ("virtio-mem-pci", "not in the stream"),
        ("virtio-mem-pci-non-transitional", "not in the stream"),
        ("virtio-mem-device", "not in the stream"),
        ("ivshmem-plain", "shared with others"),
        ("ivshmem-doorbell", "shared with others"),
    ],
)
def test_devices(option, form, driver, why):
    said = refusal(f"{option} {form.format(driver)}")
    assert f"QEMU device {driver}: " in said and why in said


@pytest.mark.parametrize(
    "text",
    [
        "-netdev vhost-user,id=n,chardev=c",
        "-netdev id=n,type=vhost-user",
        '-netdev {"type":"vhost-user","id":"n"}',
        "-netdev vhost-vdpa,vhostdev=/dev/v,id=n",
        "-nic vhost-user,chardev=c",
        "-net vhost-user",
    ],
)
def test_netdevs(text):
    assert "QEMU netdev vhost-" in refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "-blockdev driver=virtio-blk-vhost-user,path=/s,node-name=d",
        '-blockdev {"driver":"raw","file":{"driver":"virtio-blk-vhost-vdpa"}}',
        "-drive if=none,driver=raw,file.driver=virtio-blk-vfio-pci",
        "-drive if=none,driver=nvme",
    ],
)
def test_block_drivers(text):
    assert "QEMU block driver " in refusal(text)


@pytest.mark.parametrize("kind", ["x-remote-object", "x-vfio-user-server", "memory-backend-epc"])
def test_objects(kind):
    assert f"QEMU object {kind}: " in refusal(f"-object {kind},id=x")
    assert f"QEMU object {kind}: " in refusal(f'-object {{"qom-type":"{kind}","id":"x"}}')


@pytest.mark.parametrize(
    "table", [refusals.DEVICES, refusals.NETDEVS, refusals.BLOCK_DRIVERS, refusals.OPTIONS]
)
def test_every_refusal_says_what_to_do(table):
    words = ("remove it", "unplug it", "use ", "start ", "put its")
    assert all(any(word in why for word in words) for why in table.values())


@pytest.mark.parametrize(
    ("text", "implied", "pairs"),
    [
        ("memory-backend-ram,id=a", "qom-type", [("qom-type", "memory-backend-ram"), ("id", "a")]),
        ("q35,smm", "type", [("type", "q35"), ("smm", "on")]),
        ("type=q35,file=a,,b", "type", [("type", "q35"), ("file", "a,b")]),
        ("path=,,x,,", "", [("path", ",x,")]),
        ("a=x,,,b=y", "", [("a", "x,"), ("b", "y")]),
        ("h=0,h=2-3", "", [("h", "0"), ("h", "2-3")]),
        ("mem-lock", "", [("mem-lock", "on")]),
        ("x,noshare", "driver", [("driver", "x"), ("share", "off")]),
        ('{"a":[0,1],"b":true}', "a", [("a", [0, 1]), ("b", True)]),
        ("", "a", []),
    ],
)
def test_syntax(text, implied, pairs):
    assert syntax.read_pairs(text, implied) == pairs
    written = syntax.write_pairs(pairs, implied, syntax.is_json(text))
    assert syntax.read_pairs(written, implied) == pairs


@pytest.mark.parametrize("word", ["On", "TRUE", "1", "off", "", None, 1, False])
def test_what_is_not_true(word):
    assert syntax.is_true(word) is False
