"""sharded_pc: receive a QEMU guest by postcopy into memory shared by several processes.

`attach` maps a guest's RAM while it streams in and gives a `Guest`.
"""

from __future__ import annotations

# The package attach/ would hide the function of that name if it were first imported later.
from sharded_pc.attach.client import Guest, attach
from sharded_pc.errors import ShardedPcError

__all__ = ["attach", "Guest", "ShardedPcError"]
__version__ = "0.1.0"
