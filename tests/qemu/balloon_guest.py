"""The ballooning guest (balloon_guest.c), built for `-kernel`."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("balloon_guest.c")
LAYOUT = """
ENTRY(start)
SECTIONS {
  . = 0x100000;
  .text : { *(.multiboot) *(.text.start) *(.text*) *(.rodata*) }
  .data : { *(.data*) }
  .bss : { *(.bss*) *(COMMON) }
  /DISCARD/ : { *(.note*) *(.eh_frame*) *(.comment*) }
}
"""


def build(folder: Path) -> Path:
    """The guest as a multiboot ELF file in ``folder``."""
    layout, kernel = folder / "balloon.ld", folder / "balloon.elf"
    layout.write_text(LAYOUT)
    flags = ["-m32", "-march=i686", "-O1", "-Wall", "-Wextra", "-Werror", "-ffreestanding"]
    flags += ["-fno-pic", "-fno-pie", "-fno-stack-protector", "-fcf-protection=none"]
    link = [
        "-nostdlib",
        "-static",
        "-no-pie",
        f"-Wl,-T,{layout}",
        "-Wl,--build-id=none",
        "-Wl,-z,noexecstack",
    ]
    command = ["cc", *flags, *link, "-o", str(kernel), str(SOURCE)]
    subprocess.run(
        command, check=True, capture_output=True
    )  # ld has a word on one writable segment
    return kernel
