"""Builds the targets in C: with a compiler of any kind and replay.c, or with clang and libFuzzer.
Both programs take `-runs=N`, `-seed=N`, `-artifact_prefix=P` and folders."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

from sharded_pc.native.multifd import can_unpack
from sharded_pc.wire.multifd import Flag

HERE = Path(__file__).parent / "native"
TESTS = HERE.parent.parent / "native"
PACKAGE = HERE.parent.parent.parent / "sharded_pc"
CORE = PACKAGE / "native"
GUEST = PACKAGE / "attach" / "guest"

_READER = (
    *sorted(set(CORE.glob("**/*.c")) - {CORE / "binding.c", CORE / "child/main.c"}),
    TESTS / "world.c",
    HERE / "reader.c",
)
_FLAGS = ("-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-pthread", "-fno-sanitize-recover=all")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    sources: tuple[Path, ...]
    flags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


# Behind the sources, as a linker wants them; what this build has, the target has.
_UNPACKING = tuple(
    word
    for flag, words in (
        (Flag.ZLIB, ("-DSP_HAVE_ZLIB", "-lz")),
        (Flag.ZSTD, ("-DSP_HAVE_ZSTD", "-lzstd")),
    )
    if can_unpack(flag)
    for word in words
)
TARGETS = {
    "discards": Target((HERE / "discards.c", *_READER), ("-Wl,--wrap=syscall",)),
    "message": Target((HERE / "message.c", GUEST / "message.c")),
    "packets": Target((HERE / "packets.c", *_READER), ("-Wl,--wrap=syscall",), _UNPACKING),
    "ram": Target((HERE / "ram.c", *_READER), ("-Wl,--wrap=syscall",)),
}


def build(name: str, program: Path, *, libfuzzer: bool) -> Path:
    """CalledProcessError, the compiler's words in its `stderr`."""
    target, includes = TARGETS[name], [f"-I{CORE}", f"-I{TESTS}", f"-I{HERE}"]
    if libfuzzer:
        compiler, also = ["clang", "-fsanitize=fuzzer,address,undefined"], []
    else:
        compiler = ["cc", "-fsanitize=address,undefined", "-Wconversion", "-Wshadow", "-Werror"]
        also = [HERE / "replay.c"]
    command = [*compiler, *_FLAGS, *target.flags, *includes, "-o", program, *also, *target.sources]
    command += target.libraries
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    return program
