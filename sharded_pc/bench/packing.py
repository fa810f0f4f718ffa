"""Payloads of multifd's packets as a source compresses them: one stream for each channel, flushed
behind each packet (QEMU migration/multifd-zlib.c, multifd-zstd.c; level 1, as is its default)."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable

from sharded_pc.errors import HostError
from sharded_pc.wire.multifd import MAX_PACKED_BYTES, Flag

Pack = Callable[[bytes], bytes]
LEVEL = 1
FLAGS = {"none": Flag(0), "zlib": Flag.ZLIB, "zstd": Flag.ZSTD}


def packer(method: str) -> Pack:
    """A channel's, from its first packet on.  HostError."""
    return {"none": lambda: bytes, "zlib": _zlib, "zstd": _zstd}[method]()


def _zlib() -> Pack:
    stream = zlib.compressobj(LEVEL)
    return lambda data: stream.compress(data) + stream.flush(zlib.Z_SYNC_FLUSH)


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer, ZSTD_outBuffer."""

    _fields_ = (("at", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


def _zstd() -> Pack:
    """By the library itself: Python has it from 3.14 on."""
    try:
        lib = ctypes.CDLL("libzstd.so.1")
    except OSError as error:
        raise HostError(f"compress by zstd: {error}") from None
    lib.ZSTD_createCStream.restype = ctypes.c_void_p
    lib.ZSTD_initCStream.argtypes = (ctypes.c_void_p, ctypes.c_int)
    both = ctypes.c_void_p, ctypes.POINTER(_Buffer)
    lib.ZSTD_compressStream.argtypes = (*both, ctypes.POINTER(_Buffer))
    lib.ZSTD_flushStream.argtypes = both
    stream, room = lib.ZSTD_createCStream(), ctypes.create_string_buffer(MAX_PACKED_BYTES)
    lib.ZSTD_initCStream(stream, LEVEL)

    def pack(data: bytes) -> bytes:
        out = _Buffer(ctypes.addressof(room), len(room), 0)
        given = _Buffer(ctypes.cast(data, ctypes.c_void_p), len(data), 0)
        lib.ZSTD_compressStream(stream, out, given)
        left = lib.ZSTD_flushStream(stream, out)
        assert given.pos == len(data) and left == 0, "zstd needs more room than QEMU has for it"
        return room.raw[: out.pos]

    return pack
