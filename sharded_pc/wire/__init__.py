"""QEMU's migration stream, sans-I/O: bytes in, events out, and back.

Nothing here reads or writes anything; `sharded_pc.incoming` feeds it from the wire.  The bulk RAM
path has its reference here (`ram.py`) and a C twin (native/stream/ram.c): one table of cases runs
on both.
"""
