"""The library of `sharded-pc guest`: makes a program that maps RAM a guest (calls.c tells how)."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from sharded_pc.attach.preload import installed
from sharded_pc.errors import HostError

FILE = "libsharded_pc_guest.so"
"""Who has it mapped is a guest, or will be when it maps RAM."""
BROKER = "SHARDED_PC_BROKER"
"""Names the broker's socket (attach/broker.py)."""


def library_path() -> Path:
    """Where the library is installed; HostError."""
    return installed(FILE)


def check_loads(program: str) -> None:
    """HostError if the program at this path would run without LD_PRELOAD (ld.so(8))."""
    try:
        privileged = os.stat(program).st_mode & (stat.S_ISUID | stat.S_ISGID)
        privileged = privileged or "security.capability" in os.listxattr(program)
        static = _is_static(Path(program))
    except OSError as error:
        raise HostError(f"read {program}: {error.strerror}") from error
    if privileged or static:
        why = "is statically linked" if static else "gets privileges when it starts"
        raise HostError(
            f"{program} {why}, so the library that would serve its accesses to missing pages is "
            f"not loaded: use another build of it"
        )


_INTERP = 3
"""PT_INTERP (elf(5))"""


def _is_static(program: Path) -> bool:
    """An ELF executable of 64 bits that names no dynamic linker."""
    with program.open("rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            return False  # a script: its interpreter is another program
        (at,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        file.seek(at)
        table = file.read(size * count)
    kinds = (struct.unpack_from("<I", table, n * size)[0] for n in range(len(table) // size))
    return _INTERP not in kinds


def environment(broker: str) -> dict[str, str]:
    """What the program's environment needs besides ours; HostError."""
    others = os.environ.get("LD_PRELOAD")
    library = str(library_path())
    return {"LD_PRELOAD": f"{library}:{others}" if others else library, BROKER: broker}
