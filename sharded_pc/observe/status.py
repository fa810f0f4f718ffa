"""The object that `--json`, `status --json` and `query-migrate` answer with.

Keys, units and words are QMP's (qapi/migration.json, MigrationInfo); what is ours stands under
`sharded`.  Times are milliseconds.
"""

from __future__ import annotations

from sharded_pc import shm
from sharded_pc.errors import ConnectionLost
from sharded_pc.geometry import PAGE_BYTES, Geometry
from sharded_pc.memory import GuestMemory
from sharded_pc.native.control import Control, ShardCounters, Totals
from sharded_pc.native.core import now_ns
from sharded_pc.observe.memory import process_memory
from sharded_pc.state import MigrationStatus

MISSING_LISTED = 1000
"""Stretches of missing pages that are listed: a lost guest may have a million."""


def _milliseconds(start: int, end: int) -> int | None:
    return (end - start) // 1_000_000 if start and end else None


def _blocks(name: str, ram: Geometry | None, received: list[int]) -> list[dict]:
    if ram is None:
        return []
    return [
        {
            "name": block.name,
            "size": block.size,
            "page-size": block.page_size,
            "shm": shm.block_segment_name(name, block.name),
            "received-pages": pages,
        }
        for block, pages in zip(ram.blocks, received, strict=True)
    ]


def _ram(ram: Geometry | None, totals: Totals, received: list[int]) -> dict:
    total = ram.total if ram else 0
    return {
        "total": total,
        "remaining": total - sum(received) * PAGE_BYTES,
        "transferred": totals.transferred + totals.preempt_bytes,
        "normal": totals.normal,
        "normal-bytes": totals.normal * PAGE_BYTES,
        "duplicate": totals.duplicate,
        "page-size": PAGE_BYTES,
        "postcopy-requests": totals.requests_sent,
        "discarded-pages": totals.discarded,
    }


def _unreserved(name: str, ram: Geometry) -> int:
    """Bytes of RAM that /dev/shm has not given yet: a guest that touches them when it is full dies
    by SIGBUS."""
    sizes = (shm.missing_bytes(shm.block_segment_name(name, block.name)) for block in ram.blocks)
    return sum(sizes)


def shard_info(index: int, shard: ShardCounters) -> dict:
    return {
        "shard": index,
        "pid": shard.pid,
        "pages": shard.pages,
        "zero-pages": shard.zero_pages,
        "second-pages": shard.second_pages,
        "urgent-pages": shard.urgent,
        "faults": shard.faults,
        "late-faults": shard.late_faults,
        "lost-samples": shard.lost_samples,
        "postcopy-requests": shard.requests,
        "copies": shard.copies,
        "mapped-pages": shard.mapped,
        "wakes": shard.wakes,
        "discarded-pages": shard.discarded,
        "unpunched-pages": shard.unpunched,
        "restarts": shard.restarts,
        "memory": process_memory(shard.pid),
        "postcopy-latency-dist": list(shard.latency),
    }


def latency_distribution(shards: list[ShardCounters]) -> list[int]:
    """Faults for each bucket: element n counts those that took [2^n, 2^(n+1)) microseconds."""
    return [sum(column) for column in zip(*(s.latency for s in shards), strict=True)]


def mean_latency_ns(shards: list[ShardCounters]) -> int:
    samples = sum(latency_distribution(shards))
    return sum(s.latency_ns for s in shards) // samples if samples else 0


def migration_info(
    name: str,
    control: Control,
    received: list[int],
    error: str | None = None,
    huge: dict | None = None,
    missing: dict | None = None,
) -> dict:
    """`received` is the number of pages received for each block, [] before the block list; `huge`
    how much of the RAM is mapped by huge pages, `missing` what paused guests wait for, as
    [first page, pages] for each block, if the receiver knows."""
    totals, shards = control.totals, control.shards()
    ram = control.geometry if received else None  # it is published a moment before the bitmaps
    ended = totals.ended_ns or (now_ns() if totals.started_ns else 0)
    return {
        "status": control.status.value,
        "postcopy-state": control.postcopy_state.name.lower(),
        "blocks": _blocks(name, ram, received),
        "ram": _ram(ram, totals, received),
        "total-time": _milliseconds(totals.started_ns, ended),
        "downtime": _milliseconds(totals.stopped_ns, totals.running_ns),
        "setup-time": _milliseconds(totals.started_ns, totals.setup_ns),
        "postcopy-latency": mean_latency_ns(shards),
        "postcopy-latency-dist": latency_distribution(shards),
        "error-desc": error,
        "sharded": {
            "name": name,
            "placement": control.placement,
            "placement-reason": control.placement_reason,
            "guests": control.view.n_guests,
            "spills": totals.spills,
            "preempt-pages": totals.preempt_pages,
            "unreserved": _unreserved(name, ram) if ram else None,
            "stripe-size": ram.stripe_bytes if ram else None,
            "memory": process_memory(control.view.owner),
            "huge-pages": huge,
            "missing": missing,
            "shards": [shard_info(i, shard) for i, shard in enumerate(shards)],
        },
    }


def receiver_info(memory: GuestMemory, error: Exception | None, huge: dict | None) -> dict:
    """migration_info of a receiver of our own process, with what its guests may wait for."""
    control = memory.control
    received = memory.received_pages() if memory.geometry else []
    waits = is_paused(control.status) or isinstance(error, ConnectionLost)
    missing = memory.missing_stretches(MISSING_LISTED) if waits else None
    text = str(error) if error else None
    return migration_info(memory.name, control, received, text, huge, missing)


def is_paused(status: MigrationStatus) -> bool:
    """The guest runs, and there is no source to bring what is missing."""
    return status in (
        MigrationStatus.POSTCOPY_PAUSED,
        MigrationStatus.POSTCOPY_RECOVER_SETUP,
        MigrationStatus.POSTCOPY_RECOVER,
    )


def is_over(status: MigrationStatus) -> bool:
    return status in (MigrationStatus.COMPLETED, MigrationStatus.FAILED, MigrationStatus.CANCELLED)
