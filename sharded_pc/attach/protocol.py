"""The attach protocol: JSON values on a Unix stream socket, descriptors as SCM_RIGHTS.

====  =======================================================  ===========================
who   says                                                     with
====  =======================================================  ===========================
C     {"attach": {"version": 1,
      "modes": ["missing", "missing+minor"],
      ["early": true], ["pid": N]}}
R     {"geometry": {"version", "name", "mode", "stripe-size",  one memory descriptor for
      "shards", "blocks": [{"name", "size", "page-size",       each block, in order
      "first-stripe"}]}}
C     {"mappings": {"addresses": {NAME: ADDRESS}}}             one userfaultfd for each
                                                               shard, in order
R     {"attached": {"guest": N}}
R     {"event": "READY"}                                       memory may be touched
R     {"event": "COMPLETED", ["huge-pages": true]}             all is here, nothing registered;
                                                               the RAM stands on huge pages
====  =======================================================  ===========================

The geometry comes once the source has sent its block list, to a destination QEMU ("early") as soon
as there are segments for its memory backends: then these alone, under their ids.  READY once faults
are answered (or the migration has completed).  Stripe s of a block, counted from its "first-
stripe", belongs to shard ``s % shards``; the client registers each shard's stripes with that
shard's userfaultfd in "mode" and keeps its own copy of each: if all copies of a userfaultfd closed,
the kernel would wake waiters and they would read zeros.  "mode" is null when everything has
arrived: then there is nothing to register and the client answers with no descriptors.  "mode" is
"missing+minor" where pages are received straight into the memory ("continue" placement): what
stands there may be touched only through a mapping that is registered so, and the client must not
touch its mapping before.  Instead of any answer the receiver may say {"error": {"desc": TEXT}} and
close.  {"event": "FAILED", "desc": TEXT} after READY means that missing pages will not come from
this receiver: accesses to them wait.

"pid" is the process that has the memory, where another has connected for it (broker.py): its
mappings are looked at.

If the socket closes before COMPLETED, another receiver may take this one's place on the same memory
and the same path.  The client connects there again, with pauses, and hands the same userfaultfds
over; that receiver wakes who waits, so that faults which its predecessor had read come again.  It
is refused unless its "mode", "stripe-size", "shards" and each "first-stripe" modulo "shards" are
those that were registered.  attach/guest is the client's end, of Python and of the preload library.
"""

from __future__ import annotations

import dataclasses
import itertools

from sharded_pc.errors import AttachError
from sharded_pc.geometry import Geometry, Placement, RamBlock

VERSION = 1
MODES = {"missing": 1, "missing+minor": 1 | 4}
"""Mode words and their UFFDIO_REGISTER_MODE_* bits."""
MODE_OF = {Placement.COPY: "missing", Placement.CONTINUE: "missing+minor"}
"""What each placement needs of its guests."""

READY, COMPLETED, FAILED = "READY", "COMPLETED", "FAILED"


def attach(pid: int | None = None) -> dict:
    """`pid`: of the process that has the memory, if another says this for it."""
    body: dict = {"version": VERSION, "modes": list(MODES)}
    return {"attach": body if pid is None else {**body, "pid": pid}}


def geometry(name: str, ram: Geometry, mode: str | None) -> dict:
    blocks, stripe = [], 0
    for block in ram.blocks:
        blocks.append(
            {
                "name": block.name,
                "size": block.size,
                "page-size": block.page_size,
                "first-stripe": stripe,
            }
        )
        stripe += -(-block.size // ram.stripe_bytes)
    return {
        "geometry": {
            "version": VERSION,
            "name": name,
            "mode": mode,
            "stripe-size": ram.stripe_bytes,
            "shards": ram.shards,
            "blocks": blocks,
        }
    }


def mappings(addresses: dict[str, int]) -> dict:
    return {"mappings": {"addresses": addresses}}


def error(text: str) -> dict:
    return {"error": {"desc": text}}


def completed(*, huge_pages: bool) -> dict:
    return {"event": COMPLETED, "huge-pages": True} if huge_pages else {"event": COMPLETED}


def event(word: str, desc: str | None = None) -> dict:
    return {"event": word} if desc is None else {"event": word, "desc": desc}


def _body(message: object, key: str) -> dict:
    """The object under `key`; AttachError says what came instead."""
    body = message.get(key) if isinstance(message, dict) else None
    if not isinstance(body, dict):
        raise AttachError(f"expected {{{key!r}: {{...}}}}, got {str(message)[:80]}")
    return body


def is_early(message: object) -> bool:
    """Whether a checked "attach" is of a destination that needs no more than its backends."""
    return _body(message, "attach").get("early") is True


def check_attach(message: object) -> list:
    """The modes that the client can register; AttachError."""
    body = _body(message, "attach")
    if body.get("version") != VERSION:
        raise AttachError(f"attach version {body.get('version')!r}, expected {VERSION}")
    modes = body.get("modes")
    if not isinstance(modes, list) or not any(mode in modes for mode in MODES):
        raise AttachError(f"attach modes {modes!r}, expected a list with {next(iter(MODES))!r}")
    return modes


def pid_of(message: object) -> int | None:
    """The process that a checked `attach` is for, if it is not who says it; AttachError."""
    pid = _body(message, "attach").get("pid")
    if pid is not None and (type(pid) is not int or not 0 < pid < 1 << 31):
        raise AttachError(f"attach for process {str(pid)[:80]}: that is no number of one")
    return pid


def choose_mode(placement: Placement, offered: list) -> str:
    """The mode for a client that offered these; AttachError."""
    mode = MODE_OF[placement]
    if mode not in offered:
        raise AttachError(
            f"attach modes {offered!r}, but placement {placement.value!r} needs {mode!r}: use a "
            f"client that knows it, or a receiver with --placement copy"
        )
    return mode


def check_mappings(message: object, ram: Geometry) -> list[int]:
    """Addresses in block order, 0 where a block is not mapped; AttachError."""
    addresses = _body(message, "mappings").get("addresses")
    if not isinstance(addresses, dict):
        raise AttachError("mappings without addresses")
    for name, address in addresses.items():
        _check_address(name, address, ram)
    _check_overlaps(addresses, ram)
    return [addresses.get(block.name, 0) for block in ram.blocks]


def _check_address(name: str, address: object, ram: Geometry) -> None:
    try:
        block = ram.block(name)
    except KeyError:
        raise AttachError(f"mapping of unknown block {name!r}") from None
    good = isinstance(address, int) and not isinstance(address, bool)
    if not good or address <= 0 or address % block.page_size or address + block.size >= 1 << 64:
        raise AttachError(f"block {name!r} cannot be mapped at address {address!r}")


def _check_overlaps(addresses: dict[str, int], ram: Geometry) -> None:
    spans = sorted((address, address + ram.block(name).size) for name, address in addresses.items())
    for (_, end), (start, _) in itertools.pairwise(spans):
        if start < end:
            raise AttachError(f"two blocks are mapped at address {start:#x}")


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """What a client is told of the RAM."""

    name: str
    ram: Geometry
    mode: str | None


def check_geometry(message: object) -> Offer:
    """The receiver's offer; AttachError with its reason if it refused."""
    if isinstance(message, dict) and "error" in message:
        raise AttachError(f"the receiver refused: {_body(message, 'error').get('desc')}")
    body = _body(message, "geometry")
    if body.get("version") != VERSION:
        raise AttachError(f"geometry version {body.get('version')!r}, expected {VERSION}")
    try:
        blocks = tuple(RamBlock(b["name"], b["size"], b["page-size"]) for b in body["blocks"])
        offer = Offer(
            body.get("name", ""),
            Geometry(blocks, body["shards"], body["stripe-size"]),
            body["mode"],
        )
    except (KeyError, TypeError):
        offer = None
    if offer is None or not _is_usable(offer):
        raise AttachError(f"the receiver's geometry cannot be used: {str(body)[:80]}")
    return offer


def _is_usable(offer: Offer) -> bool:
    """JSON's types are not ours: a size may be text, a fraction or true."""
    names: list[object] = [offer.name]
    sizes: list[object] = [offer.ram.shards, offer.ram.stripe_bytes]
    for block in offer.ram.blocks:
        names.append(block.name)
        sizes += [block.size, block.page_size]
    counted = all(type(size) is int and size > 0 for size in sizes)
    return counted and all(isinstance(n, str) for n in names) and offer.mode in (None, *MODES)
