"""What cannot be combined with this receiver, by its name on QEMU's command line: tables, and the
walk over them.  Each line says why and what to do instead.  Names are patterns of `fnmatch`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from sharded_pc.errors import UsageError
from sharded_pc.qemu_args.command_line import CommandLine, Option
from sharded_pc.qemu_args.syntax import is_true

_USER = "QEMU opens its userfaultfd as the receiver's user: start the receiver as that user instead"
_ROOT = "QEMU needs the receiver's sockets and segments; start the receiver in that root instead"
_RAM = "the RAM comes from this receiver; remove it"

OPTIONS = {
    "-daemonize": "QEMU must stay this command's child; remove it",
    "-mem-path": _RAM,
    "-mem-prealloc": "the RAM arrives on demand; remove it",
    "-preconfig": "QEMU must reach its incoming migration by itself; remove it",
    "-loadvm": "the guest's state comes from the source; remove it",
    "-readconfig": "put its options on the command line, where they can be seen",
    "-runas": _USER,
    "-chroot": _ROOT,
}
RUN_WITH = {"user": _USER, "chroot": _ROOT}

_BACK_END = "its back-end maps the RAM without a userfaultfd and would read zeros"
_ELSEWHERE = f"{_BACK_END}; use a device that QEMU serves itself, at the source as well"
_PASSED = (
    "a passed-through device cannot wait for a page; unplug it at the source before it migrates"
)

DEVICES = {
    "vhost-vdpa*": _ELSEWHERE,
    "x-pci-proxy-dev": _ELSEWHERE,
    "vfio-*": _PASSED,
    "pvrdma": _PASSED,
    "virtio-mem*": "its plugged memory is not in the stream; use pc-dimm, at the source as well",
    "ivshmem-*": "its memory is shared with others, who would not wait for a page; unplug it at "
    "the source before it migrates",
}
NETDEVS = {"vhost-vdpa": _ELSEWHERE}
"""-netdev, -nic, -net; vhost-user is looked at by back_ends.py.

vhost=on of a tap is the kernel's vhost: it reads the RAM in QEMU's own
address space, where missing pages are waited for."""
BLOCK_DRIVERS = {
    "virtio-blk-vhost-*": _ELSEWHERE,
    "virtio-blk-vfio-*": _PASSED,
    "nvme": _PASSED,
}
OBJECTS = {
    "x-remote-object": "it gives the RAM to another process, which would read zeros; remove it",
    "x-vfio-user-server": "it gives the RAM to another process, which would read zeros; remove it",
    "memory-backend-epc": "enclave memory does not migrate; start both guests without it",
}
MACHINES = {"x-remote": "it has no RAM of its own; give the source's machine type"}

CAPABILITIES = (
    "auto-converge", "background-snapshot", "block", "colo", "compress", "dirty-bitmaps",
    "dirty-limit", "events", "ignore-shared", "late-block-activate", "mapped-ram", "multifd",
    "pause-before-switchover", "postcopy-preempt", "postcopy-ram", "rdma-pin-all", "release-ram",
    "return-path", "switchover-ack", "validate-uuid", "xbzrle", "zero-blocks", "zero-copy-send",
)  # fmt: skip
"""Of QEMU 7.2 to 10.x; as properties of `migration` most have an x- before."""


def check(line: CommandLine) -> None:
    """UsageError for the first thing on the command line that these tables name."""
    for option in line.options:
        if option.name in OPTIONS:
            raise UsageError(f"QEMU option {option.text}: {OPTIONS[option.name]}")
        look = _LOOKS.get(option.name)
        if look:
            look(option)
    machine = line.merged("-machine")
    _look_up(MACHINES, machine.get("type"), "machine")
    if is_true(machine.get("aux-ram-share")):
        raise UsageError(
            "QEMU option -machine aux-ram-share=on: blocks that QEMU keeps itself would be left "
            "out of its stream; remove it"
        )


def _look_up(table: Mapping[str, str], name: object, what: str) -> None:
    for pattern, why in table.items():
        if fnmatchcase(str(name), pattern):
            raise UsageError(f"QEMU {what} {name}: {why}")


def _look_at_incoming(option: Option) -> None:
    if option.text != "defer":
        raise UsageError(
            f"QEMU option -incoming {option.text}: the stream comes through this receiver; "
            f"remove it"
        )


def _look_at_overcommit(option: Option) -> None:
    lock = option.values().get("mem-lock")  # on-fault waits for each page
    if is_true(lock):
        raise UsageError(
            f"QEMU option -overcommit mem-lock={lock}: RAM that arrives on demand cannot be "
            f"locked; remove it, or mem-lock=on-fault (QEMU 10.0)"
        )


def _look_at_run_with(option: Option) -> None:
    for key, value in option.pairs():
        if key in RUN_WITH:
            raise UsageError(f"QEMU option -run-with {key}={value}: {RUN_WITH[key]}")


def _look_at_global(option: Option) -> None:
    values = option.values()
    named = f"{values.get('driver')}.{values.get('property')}"
    for key in (named, *values):
        driver, _, name = key.partition(".")
        if driver == "migration" and name.removeprefix("x-") in CAPABILITIES:
            raise UsageError(
                f"QEMU option -global {key}: the receiver sets the migration's capabilities; "
                f"remove it"
            )


def _drivers(value: Any) -> Iterator[object]:
    """A block device's drivers, also of the nodes within it."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key.rpartition(".")[2] == "driver":
            yield inner
        yield from _drivers(inner)


def _look_at_block(option: Option) -> None:
    for driver in _drivers(option.values()):
        _look_up(BLOCK_DRIVERS, driver, "block driver")


def _look_at_netdev(option: Option) -> None:
    values = option.values()
    _look_up(NETDEVS, values.get("type"), "netdev")
    if is_true(values.get("vhost-user")):  # passt, QEMU 10.1
        raise UsageError(f"QEMU netdev vhost-user: {_ELSEWHERE}")


_LOOKS = {
    "-device": lambda option: _look_up(DEVICES, option.values().get("driver"), "device"),
    "-object": lambda option: _look_up(OBJECTS, option.values().get("qom-type"), "object"),
    "-netdev": _look_at_netdev,
    "-nic": _look_at_netdev,
    "-net": _look_at_netdev,
    "-blockdev": _look_at_block,
    "-drive": _look_at_block,
    "-incoming": _look_at_incoming,
    "-overcommit": _look_at_overcommit,
    "-run-with": _look_at_run_with,
    "-global": _look_at_global,
}
