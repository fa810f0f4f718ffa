"""Kernel, limits on mappings, processors and QEMU."""

from __future__ import annotations

import re
import shutil
import subprocess

from sharded_pc.geometry import MAX_STRIPES, PAGE_BYTES
from sharded_pc.host.finding import Finding, fact, optional, required
from sharded_pc.host.limits import Limits

MIN_KERNEL = (4, 11)
"""A userfaultfd serves shared memory since then."""

MAPS_NEEDED = MAX_STRIPES + 4096
"""A guest has one mapping per stripe, and its own libraries, stacks and devices."""

QEMU = "qemu-system-x86_64"


def kernel(limits: Limits) -> Finding:
    match = re.match(r"(\d+)\.(\d+)", limits.kernel)
    ok = match is not None and (int(match[1]), int(match[2])) >= MIN_KERNEL
    remedy = "boot Linux {}.{} or newer".format(*MIN_KERNEL)
    return required("linux", ok, limits.kernel or "release unknown", remedy)


def page_size(limits: Limits) -> Finding:
    ok = limits.page_bytes == PAGE_BYTES
    remedy = f"boot a kernel with pages of {PAGE_BYTES} bytes"
    return required("page size", ok, f"{limits.page_bytes} bytes", remedy)


def map_count(limits: Limits) -> Finding:
    count = limits.max_map_count or 0
    detail = f"{count}, at least {MAPS_NEEDED} needed for {MAX_STRIPES} stripes"
    remedy = "sysctl vm.max_map_count=65530"
    return required("vm.max_map_count", count >= MAPS_NEEDED, detail, remedy)


def cpus(limits: Limits) -> Finding:
    return fact("cpus", str(limits.cpus))


def qemu() -> Finding:
    """Only `run` needs one, of any place; starting it costs milliseconds, so it stands apart."""
    path = shutil.which(QEMU)
    if path is None:
        remedy = "apt-get install qemu-system-x86 (Fedora: dnf install qemu-system-x86-core)"
        return optional("qemu", False, f"no {QEMU} in PATH, `run` needs one", remedy)
    result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    words = (result.stdout or result.stderr).splitlines() or [f"ended with {result.returncode}"]
    remedy = "apt-get install --reinstall qemu-system-x86"
    return optional("qemu", result.returncode == 0, f"{path}: {words[0]}", remedy)


JUDGES = (kernel, page_size, map_count, cpus)
