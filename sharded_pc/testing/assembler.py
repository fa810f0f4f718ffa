"""Machine code written as a listing: hexadecimal bytes, comments behind ';', and few tokens more.

"name:" defines a label; "@name" is a jump distance to it in 1 byte, "@@name" in 4 bytes, "&name"
its address in 2 bytes; "{name}" is a parameter of 4 bytes, "{name:1}" of 1.
"""

from __future__ import annotations

import struct

LOAD_ADDRESS = 0x7C00
"""Where a BIOS puts a boot sector."""
SECTOR_BYTES = 512


def assemble(listing: str, **parameters: int) -> bytes:
    """The bytes of a listing; jumps resolved, parameters put in little-endian."""
    lines = [line.split(";")[0].split() for line in listing.splitlines()]
    tokens = [token for line in lines for token in line]
    labels = _label_offsets(tokens)
    code = bytearray()
    for token in tokens:
        code += _encode(token, len(code), labels, parameters)
    return bytes(code)


def boot_sector(program: bytes) -> bytes:
    """512 bytes that a BIOS boots; ValueError for a program that is longer than 510."""
    if len(program) > SECTOR_BYTES - 2:
        raise ValueError(f"program of {len(program)} bytes does not fit a boot sector")
    return program.ljust(SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"


def _token_size(token: str) -> int:
    if token.endswith(":"):
        return 0
    if token.startswith("@@"):
        return 4
    if token.startswith("&"):
        return 2
    if token.startswith("{"):
        return 1 if token.endswith(":1}") else 4
    return 1


def _label_offsets(tokens: list[str]) -> dict[str, int]:
    labels, offset = {}, 0
    for token in tokens:
        if token.endswith(":"):
            labels[token[:-1]] = offset
        offset += _token_size(token)
    return labels


def _encode(token: str, at: int, labels: dict[str, int], parameters: dict[str, int]) -> bytes:
    size = _token_size(token)
    if size == 0:
        return b""
    if token.startswith("@"):
        distance = labels[token.lstrip("@")] - (at + size)
        return struct.pack("<b" if size == 1 else "<i", distance)
    if token.startswith("&"):
        return struct.pack("<H", LOAD_ADDRESS + labels[token[1:]])
    if token.startswith("{"):
        return parameters[token.strip("{}").split(":")[0]].to_bytes(size, "little")
    return bytes.fromhex(token)
