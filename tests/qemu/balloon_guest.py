"""Guests that are a C file (balloon_guest.c, blk_guest.c), built for `-kernel`."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
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


def build(folder: Path, name: str = "balloon_guest") -> Path:
    """The guest as a multiboot ELF file in ``folder``."""
    layout, kernel = folder / f"{name}.ld", folder / f"{name}.elf"
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
    command = ["cc", *flags, *link, "-o", str(kernel), str(HERE / f"{name}.c")]
    subprocess.run(
        command, check=True, capture_output=True
    )  # ld has a word on one writable segment
    return kernel
