"""A domain with the checking guest (``tests.qemu.guest_image``), on whichever host it is."""

from __future__ import annotations

import re
import subprocess
import uuid
from pathlib import Path
from typing import Any

from tests.libvirt.host import TIMEOUT_S, Host
from tests.qemu import wait_until

MEMORY_MIB = 96
"""The guest faults all of it in within seconds, so in postcopy there is that much time."""
XML = """
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory}</memory>
  {backing}
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{image}'/>
      <target dev='hda' bus='ide'/>
      <shareable/>
    </disk>
    <serial type='file'><source path='/var/log/libvirt/{name}.serial' append='on'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
TCP = "tcp:127.0.0.1"
MIB_S = 128
"""The guest writes more than that, so that precopy never ends by itself."""
QEMU = "/usr/bin/qemu-system-x86_64"


class Domain:
    """``name`` on ``host``; ``host`` is where a test looks for it next."""

    def __init__(
        self, name: str, image: Path, *, memory_mib: int = MEMORY_MIB, emulator: str = QEMU,
        backing: str = "",
    ) -> None:  # fmt: skip
        self.name, self.memory_mib = name, memory_mib
        number = uuid.uuid5(uuid.NAMESPACE_URL, name)  # libvirt compares it on both sides
        self._fields = {
            "name": name,
            "uuid": number,
            "memory": memory_mib,
            "image": image,
            "backing": backing,
        }
        self._emulator = emulator

    def xml(self, emulator: str | None = None) -> str:
        return XML.format(**self._fields, emulator=emulator or self._emulator)

    def start(self, host: Host) -> None:
        """Boots it; its memory is filled afterwards."""
        file = host.folder / f"{self.name}.xml"
        file.write_text(self.xml())
        host.virsh("create", file)
        wait_until(lambda: "F" in self.said(host), f"{self.name}'s memory filled")

    def migrate(self, source: Host, to: Host, *options: str, **more: Any) -> str:
        """Live, slowly enough that it does not end in precopy by itself; what virsh prints."""
        return source.finish(self.start_migration(source, to, *options, **more))

    def start_migration(
        self, source: Host, to: Host, *options: str, uri: str | None = TCP, xml: str | None = None,
        mib_s: int | None = MIB_S, postcopy_mib_s: int = MIB_S,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """For ``source.finish``; ``mib_s`` None: as fast as it can; ``uri`` None: libvirt's own
        connection is to carry it."""
        words = ["--live", "--unsafe", *options]
        if mib_s is not None:
            words += ["--bandwidth", str(mib_s)]
        if "--postcopy" in options:
            words += ["--postcopy-bandwidth", str(postcopy_mib_s)]
        if uri == TCP:
            words += ["--listen-address", "127.0.0.1"]
        if xml:
            file = to.folder / f"{self.name}-incoming.xml"
            file.write_text(xml)
            words += ["--xml", str(file)]
        return source.start_virsh("migrate", *words, self.name, to.uri, *([uri] if uri else []))

    def said(self, host: Host, since: int = 0) -> str:
        """What it printed while it ran there."""
        file = host.folder / f"log/libvirt/{self.name}.serial"
        return file.read_text()[since:] if file.exists() else ""

    def wait_passes(self, host: Host, passes: int = 3, timeout: float = TIMEOUT_S) -> None:
        """Until it has walked over its memory that often from now on, all of it right."""
        since = len(self.said(host))

        def enough() -> bool:
            return self.said(host, since).count(".") >= passes

        wait_until(enough, f"{passes} passes of {self.name}", timeout)
        assert "E" not in (said := self.said(host)), said

    def emulator(self, host: Host) -> str:
        """What its XML has, as it runs there."""
        xml = host.virsh("dumpxml", self.name)
        (found,) = re.findall("<emulator>(.*)</emulator>", xml)
        return found

    def state(self, host: Host) -> str:
        """``virsh domstate --reason``."""
        return host.virsh("domstate", "--reason", self.name).strip()
