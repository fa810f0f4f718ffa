"""sharded_pc: receive a QEMU guest by postcopy into memory shared by several processes.

`attach` maps a guest's RAM while it streams in.
"""

from __future__ import annotations

from sharded_pc.errors import ShardedPcError

__all__ = ["attach", "Guest", "ShardedPcError"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # The extension is loaded when it is needed: `sharded-pc --help` works without it.
    if name in ("attach", "Guest"):
        from sharded_pc.attach import client

        return getattr(client, name)
    raise AttributeError(f"module 'sharded_pc' has no attribute {name!r}")
