"""The guest of `bench fault --peer`: a boot sector that times its first read of every page.

It waits until the word at FLAG is not 0, and stores the time stamp counter's low half at CLOCK
meanwhile.  Then it reads every page of [START, START + size) once, in a jumping order (a linear
congruential generator of full period), with RDTSC before and after, and checks the page's first and
last word.  In the end it writes what it found to the debug console (port 0xe9), which is to be a
file (`-debugcon file:PATH`).  Interrupts are off; there is no paging and no stack.
"""

from __future__ import annotations

import dataclasses
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

from sharded_pc.geometry import PAGE_BYTES
from sharded_pc.native.page_service import PATTERN_KEY
from sharded_pc.testing.assembler import assemble, boot_sector

MIB = 1 << 20
START = 16 * MIB
"""Guest-physical address of the first page that is touched."""
FLAG = 0x10000
"""The guest runs when this word is not 0."""
CLOCK = 0x11000
"""Low half of the time stamp counter, while it waits."""
FOUND = MIB
"""Where it collects what it finds, up to START."""
READY = b"R"
"""On the debug console: it waits."""
_MULTIPLIER, _INCREMENT = 1664525, 1013904223
"""Of Numerical Recipes' generator: 1 modulo 4 and odd, so that every power of two is a period."""
_HEAD = struct.Struct("<QQI")

LISTING = """
                                    ; 16 bits, entered by the BIOS at 0:7c00
    fa                              ; cli
    31 c0                           ; xor  ax, ax
    8e d8                           ; mov  ds, ax
    e4 92                           ; in   al, 0x92         A20 on
    0c 02                           ; or   al, 2
    24 fe                           ; and  al, 0xfe         (bit 0 would reset the machine)
    e6 92                           ; out  0x92, al
    0f 01 16 &gdtr                  ; lgdt [gdtr]
    0f 20 c0                        ; mov  eax, cr0
    0c 01                           ; or   al, 1
    0f 22 c0                        ; mov  cr0, eax
    ea &protected 08 00             ; jmp  8:protected

protected:                          ; 32 bits from here on
    66 b8 10 00                     ; mov  ax, 0x10
    8e d8                           ; mov  ds, ax
    8e c0                           ; mov  es, ax
    8e d0                           ; mov  ss, ax
    c7 05 {flag} 00 00 00 00        ; mov  dword [flag], 0
    b0 52                           ; mov  al, 'R'
    e6 e9                           ; out  0xe9, al
wait:
    0f 31                           ; rdtsc                 edx:eax: ticks
    a3 {clock}                      ; mov  [clock], eax
    83 3d {flag} 00                 ; cmp  dword [flag], 0
    74 @wait                        ; je   wait

    31 ed                           ; xor  ebp, ebp         ebp: the page's index
    31 f6                           ; xor  esi, esi         esi: wrong words
    b9 {count}                      ; mov  ecx, count       ecx: pages to come
    bb {latencies}                  ; mov  ebx, latencies   ebx: where the next goes
    0f 31                           ; rdtsc
    a3 {found}                      ; mov  [found], eax
    89 15 {found4}                  ; mov  [found + 4], edx
next:
    69 ed {multiplier}              ; imul ebp, ebp, multiplier
    81 c5 {increment}               ; add  ebp, increment
    81 e5 {mask}                    ; and  ebp, mask
    89 ef                           ; mov  edi, ebp
    c1 e7 0c                        ; shl  edi, 12
    81 c7 {start}                   ; add  edi, start       edi: address of the page
    c7 03 00 00 00 00               ; mov  dword [ebx], 0   this page may be missing as well:
    0f 31                           ; rdtsc                 it must not count
    89 03                           ; mov  [ebx], eax
    8b 17                           ; mov  edx, [edi]       the touch
    0f 31                           ; rdtsc
    2b 03                           ; sub  eax, [ebx]
    89 03                           ; mov  [ebx], eax
    83 c3 04                        ; add  ebx, 4
    89 f8                           ; mov  eax, edi
    35 {key}                        ; xor  eax, key
    3b 07                           ; cmp  eax, [edi]
    74 @first                       ; je   first
    46                              ; inc  esi
first:
    81 c7 {last}                    ; add  edi, last        edi: address of its last word
    89 f8                           ; mov  eax, edi
    35 {key}                        ; xor  eax, key
    3b 07                           ; cmp  eax, [edi]
    74 @second                      ; je   second
    46                              ; inc  esi
second:
    49                              ; dec  ecx
    75 @next                        ; jnz  next

    0f 31                           ; rdtsc
    a3 {found8}                     ; mov  [found + 8], eax
    89 15 {found12}                 ; mov  [found + 12], edx
    89 35 {found16}                 ; mov  [found + 16], esi
    be {found}                      ; mov  esi, found
    b9 {length}                     ; mov  ecx, length
    ba e9 00 00 00                  ; mov  edx, 0xe9
    fc                              ; cld
    f3 6e                           ; rep  outsb
halt:
    f4                              ; hlt
    eb @halt                        ; jmp  halt

gdt:
    00 00 00 00 00 00 00 00         ; the null descriptor
    ff ff 00 00 00 9b cf 00         ; 0x08: code, flat 4 GiB, already marked accessed
    ff ff 00 00 00 93 cf 00         ; 0x10: data, flat 4 GiB, already marked accessed
gdtr:
    17 00 &gdt 00 00                ; limit 23, address
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What the guest told.  Times are ticks of its time stamp counter."""

    ticks: int
    """from before the first touch until after the last page was checked"""
    wrong: int
    """words that were not as they should be"""
    latencies: array
    """one 'I' for each page, in the order of the touches"""


def length_of(pages: int) -> int:
    """Bytes that the guest tells, when it has touched all pages."""
    return _HEAD.size + 4 * pages


def parse(told: bytes) -> Found:
    """Of length_of(pages) bytes."""
    began, ended, wrong = _HEAD.unpack_from(told)
    return Found(ended - began, wrong, array("I", told[_HEAD.size :]))


def program(size: int) -> bytes:
    """The boot sector for `size` bytes to touch; ValueError unless a power of two of pages whose
    latencies fit below START."""
    pages = size // PAGE_BYTES
    if size % PAGE_BYTES or pages & (pages - 1) or not pages:
        raise ValueError(f"{size} bytes are not a power of two of pages")
    if FOUND + length_of(pages) > START:
        raise ValueError(f"{size} bytes: too many pages to tell of")
    places = {f"found{offset}": FOUND + offset for offset in (4, 8, 12, 16)}
    return boot_sector(
        assemble(
            LISTING, flag=FLAG, clock=CLOCK, found=FOUND, latencies=FOUND + _HEAD.size,
            count=pages, mask=pages - 1, multiplier=_MULTIPLIER, increment=_INCREMENT,
            start=START, key=PATTERN_KEY, last=PAGE_BYTES - 4, length=length_of(pages), **places,
        )
    )  # fmt: skip


def write_image(path: Path, size: int) -> Path:
    """A disk image of 1 MiB (one of a single sector has no valid geometry); `path`."""
    path.write_bytes(program(size).ljust(MIB, b"\0"))
    return path


def arguments(qemu: str, memory: int, image: Path, console: Path) -> tuple[str, ...]:
    """QEMU's command line for both sides; they may hold the image at the same time."""
    return (
        qemu, "-accel", "tcg", "-machine", "pc", "-smp", "1", "-m", str(memory // MIB),
        "-nodefaults", "-no-user-config", "-display", "none", "-debugcon", f"file:{console}",
        "-drive", f"file={image},format=raw,if=ide,file.locking=off",
    )  # fmt: skip


def order(pages: int) -> Sequence[int]:
    """Page indices in the guest's order."""
    found, page = array("I"), 0
    for _ in range(pages):
        page = (page * _MULTIPLIER + _INCREMENT) % pages
        found.append(page)
    return found
