"""The guest of the QEMU tests: one boot sector that walks over its memory for ever.

It enters 32-bit protected mode (no paging, interrupts off) and keeps two 32-bit words in every
page of ``[start, end)``: one at the page's first byte, one 8 bytes before its end. In pass ``n``
the word at address ``a`` must read ``a ^ n``; the guest then writes ``a ^ (n + 1)``. A page that
was lost, stale, torn or placed elsewhere is thus noticed in the next pass.

What it prints on COM1, in this order:

====================  ===========================================================================
``S``                 it runs
``F``                 every page has been filled once
``.``                 one pass over all pages is over (good or not)
``Eaaaaaaaa:vvvvvvvv ``  at once, for each wrong word: address and value found, lower-case hex
====================  ===========================================================================

With ``writes=False`` the guest only reads after the ``F``: it then writes nothing at all, not
even a stack, so that a source that loses dirty pages (QEMU 7.2 under TCG) loses none.
"""

from __future__ import annotations

from pathlib import Path

from sharded_pc.testing.assembler import assemble
from sharded_pc.testing.assembler import boot_sector as bootable

MIB = 1 << 20
PAGE_SIZE = 4096

# The program. "name:" defines a label; "@name" is a jump distance to it in 1 byte, "@@name" in
# 4 bytes, "&name" its address in 2 bytes; "{name}" is a parameter of 4 bytes, "{name:1}" of 1.
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
    bc 00 7c 00 00                  ; mov  esp, 0x7c00
    b0 53                           ; mov  al, 'S'
    e8 @@put                        ; call put
    31 ed                           ; xor  ebp, ebp         ebp: the pass
    31 c9                           ; xor  ecx, ecx         ecx: the page's turn
fill:
    69 f9 {multiplier}              ; imul edi, ecx, multiplier
    81 e7 {mask}                    ; and  edi, mask        edi: the page's index
    69 ff {step}                    ; imul edi, edi, step
    81 c7 {start}                   ; add  edi, start       edi: address of the first word
    89 3f                           ; mov  [edi], edi
    81 c7 {last}                    ; add  edi, last        edi: address of the second word
    89 3f                           ; mov  [edi], edi
    41                              ; inc  ecx
    81 f9 {count}                   ; cmp  ecx, count
    72 @fill                        ; jb   fill
    b0 46                           ; mov  al, 'F'
    e8 @@put                        ; call put

                                    ; from here no stack, unless a word is wrong
pass:
    31 c9                           ; xor  ecx, ecx
page:
    69 f9 {multiplier}              ; imul edi, ecx, multiplier
    81 e7 {mask}                    ; and  edi, mask
    69 ff {step}                    ; imul edi, edi, step
    81 c7 {start}                   ; add  edi, start
word:
    89 f8                           ; mov  eax, edi
    31 e8                           ; xor  eax, ebp         eax: what must be there
    8b 17                           ; mov  edx, [edi]       edx: what is there
    39 c2                           ; cmp  edx, eax
    74 @good                        ; je   good
    e8 @@report                     ; call report
good:
    8d 45 {writes:1}                ; lea  eax, [ebp + writes]
    31 f8                           ; xor  eax, edi
    {skip_store:1} @stored          ; jmp  stored  (busy guest: test al, imm8, which does nothing)
    89 07                           ; mov  [edi], eax
stored:
    f7 c7 08 00 00 00               ; test edi, 8           the second word's address has bit 3
    75 @next                        ; jnz  next
    81 c7 {last}                    ; add  edi, last
    eb @word                        ; jmp  word
next:
    41                              ; inc  ecx
    81 f9 {count}                   ; cmp  ecx, count
    72 @page                        ; jb   page
    83 c5 {writes:1}                ; add  ebp, writes
    ba fd 03 00 00                  ; mov  edx, 0x3fd
busy:
    ec                              ; in   al, dx
    a8 20                           ; test al, 0x20         transmitter empty?
    74 @busy                        ; jz   busy
    b2 f8                           ; mov  dl, 0xf8
    b0 2e                           ; mov  al, '.'
    ee                              ; out  dx, al
    eb @pass                        ; jmp  pass

put:                                ; prints al; spoils edx
    50                              ; push eax
    ba fd 03 00 00                  ; mov  edx, 0x3fd
wait:
    ec                              ; in   al, dx
    a8 20                           ; test al, 0x20
    74 @wait                        ; jz   wait
    58                              ; pop  eax
    b2 f8                           ; mov  dl, 0xf8
    ee                              ; out  dx, al
    c3                              ; ret

report:                             ; prints E, edi, colon, edx, blank
    60                              ; pusha
    89 d3                           ; mov  ebx, edx
    b0 45                           ; mov  al, 'E'
    e8 @@put                        ; call put
    89 fe                           ; mov  esi, edi
    e8 @@hex                        ; call hex
    b0 3a                           ; mov  al, ':'
    e8 @@put                        ; call put
    89 de                           ; mov  esi, ebx
    e8 @@hex                        ; call hex
    b0 20                           ; mov  al, ' '
    e8 @@put                        ; call put
    61                              ; popa
    c3                              ; ret

hex:                                ; prints esi, 8 digits; spoils eax, ecx, edx
    b1 08                           ; mov  cl, 8
digit:
    c1 c6 04                        ; rol  esi, 4
    89 f0                           ; mov  eax, esi
    24 0f                           ; and  al, 0xf
    04 30                           ; add  al, '0'
    3c 3a                           ; cmp  al, '9' + 1
    72 @decimal                     ; jb   decimal
    04 27                           ; add  al, 'a' - '0' - 10
decimal:
    e8 @@put                        ; call put
    fe c9                           ; dec  cl
    75 @digit                       ; jnz  digit
    c3                              ; ret

gdt:
    00 00 00 00 00 00 00 00         ; the null descriptor
    ff ff 00 00 00 9b cf 00         ; 0x08: code, flat 4 GiB, already marked accessed
    ff ff 00 00 00 93 cf 00         ; 0x10: data, flat 4 GiB, already marked accessed
gdtr:
    17 00 &gdt 00 00                ; limit 23, address
"""

_JMP_SHORT = 0xEB
_TEST_AL = 0xA8
_SCATTER = 0x9E3779B1  # odd, so that i * _SCATTER mod 2**k visits each of 2**k pages once


def boot_sector(
    start: int = MIB,
    end: int = 64 * MIB,
    step: int = PAGE_SIZE,
    *,
    writes: bool = True,
    scattered: bool = False,
) -> bytes:
    """The guest as 512 bytes, to be booted from any disk.

    ``start``, ``end`` and ``step`` are bytes; the guest visits one page each ``step``. With
    ``scattered`` it visits them in a jumping order, for which their number must be a power of
    two. ``ValueError`` for bounds outside 1 MiB..3 GiB or not multiples of 4 KiB.
    """
    count = _page_count(start, end, step)
    if scattered and count & (count - 1):
        raise ValueError(f"scattered needs a power of two of pages, not {count}")
    program = assemble(
        LISTING,
        start=start,
        step=step,
        count=count,
        last=PAGE_SIZE - 8,
        multiplier=_SCATTER if scattered else 1,
        mask=count - 1 if scattered else 0xFFFFFFFF,
        writes=int(writes),
        skip_store=_TEST_AL if writes else _JMP_SHORT,
    )
    return bootable(program)


def write_image(
    path: Path, memory_mib: int, *, writes: bool = True, scattered: bool = False
) -> Path:
    """Writes a disk image whose guest fits ``memory_mib`` of RAM, and returns ``path``.

    It walks from 1 MiB to the end of RAM; if ``scattered``, over the greatest power of two of
    bytes that fits above 1 MiB.
    """
    end = memory_mib * MIB
    if scattered:
        end = MIB + (1 << ((end - MIB).bit_length() - 1))
    sector = boot_sector(MIB, end, writes=writes, scattered=scattered)
    path.write_bytes(sector.ljust(MIB, b"\0"))  # a disk of one sector has no valid geometry
    return path


def guest_args(
    machine: str = "pc", memory_mib: int = 64, smp: int = 1, image: Path | None = None,
    accel: str = "tcg",
) -> list[str]:  # fmt: skip
    """What both sides of a migration must be started with alike, but for the serial line.

    The image is never written, so its lock is not taken and both sides may hold it.
    """
    args = ["-accel", accel, "-machine", machine, "-smp", str(smp), "-m", str(memory_mib)]
    args += ["-nodefaults", "-no-user-config", "-display", "none"]
    if image:
        args += ["-drive", f"file={image},format=raw,if=ide,file.locking=off"]
    return args


def _page_count(start: int, end: int, step: int) -> int:
    if not MIB <= start < end <= 3072 * MIB or (start | end | step) % PAGE_SIZE or step <= 0:
        raise ValueError(f"bad bounds {start:#x}..{end:#x} step {step:#x}")
    return (end - start + step - 1) // step
