"""Messages as lines for people; RAM sections that follow each other are one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sharded_pc.dump.records import KINDS
from sharded_pc.printable import printable

WORDS = {
    "normal": "pages",
    "duplicate": "zero pages",
    "xbzrle": "xbzrle pages",
    "compressed": "compressed pages",
}
MOST_RANGES = 4
"""Of a discard: the others are counted."""


def lines(messages: Iterable[dict]) -> Iterator[str]:
    """One line for each message, its offset first."""
    group: list[dict] = []
    for message in messages:
        if group and not _joins(group[0], message):
            yield _line(*group)
            group = []
        group = [_sum(*group, message)] if group else [message]
    if group:
        yield _line(*group)


def _joins(one: dict, other: dict) -> bool:
    """Neighbours that differ in their pages only."""
    keys = ("type", "kind", "section-id", "flags")
    return (
        "opaque" not in one
        and "blocks" not in one
        and one.get("type") in (None, "section", "packet")
        and all(one.get(key) == other.get(key) for key in keys)
        and "opaque" not in other
        and (one.get("kind") in (None, "part"))
    )


def _sum(one: dict, other: dict) -> dict:
    ram = {told["block"]: told for told in one.get("ram", ())}
    for told in other.get("ram", ()):
        old = ram.get(told["block"], {"block": told["block"]})
        ram[told["block"]] = {"block": told["block"]} | _summed(old, told)
    flushes = one.get("multifd-flush", 0) + other.get("multifd-flush", 0)
    out = {**one, "ram": list(ram.values()), "times": one.get("times", 1) + 1}
    out["size"] = one["size"] + other["size"]
    return out | ({"multifd-flush": flushes} if flushes else {})


def _summed(one: dict, other: dict) -> dict:
    out = {}
    for kind in KINDS:
        a, b = one.get(kind), other.get(kind)
        if a and b:
            both = {"pages": a["pages"] + b["pages"], "runs": a["runs"] + b["runs"]}
            out[kind] = both | {"first": a["first"], "last": b["last"]}
        elif a or b:
            out[kind] = a or b
    return out


def _line(message: dict) -> str:
    indent = "    " if message.get("in-package") else "  "
    what = _WHAT.get(message.get("type"), _records)(message)
    return printable(f"{message['offset']:>12}{indent}{what}  ({message['size']} bytes)")


def _records(message: dict) -> str:
    return "records: " + _pages(message)


def _pages(message: dict) -> str:
    out = [f"{told['block']} " + _kinds(told) for told in message.get("ram", ())]
    if message.get("multifd-flush"):
        out.append(f"{message['multifd-flush']} multifd flush")
    if message.get("rdma-hook"):
        out.append(f"{message['rdma-hook']} RDMA hooks")
    return "; ".join(out) or "no pages"


def _kinds(told: dict) -> str:
    return ", ".join(
        f"{told[kind]['pages']} {WORDS[kind]} in {told[kind]['runs']} runs "
        f"{told[kind]['first']:#x}..{told[kind]['last']:#x}"
        for kind in KINDS
        if kind in told
    )


def _section(message: dict) -> str:
    name = message.get("name", "unknown")
    out = f"section {message['section-id']} {name!r} {message['kind']}"
    if message.get("times"):
        out += f" x {message['times']}"
    if "instance-id" in message:
        out += f" instance {message['instance-id']} version {message['version-id']}"
    if "opaque" in message:
        return f"{out}: {message['opaque']} bytes opaque"
    if "blocks" in message:
        return f"{out}: blocks " + ", ".join(map(_block, message["blocks"]))
    return f"{out}: {_pages(message)}" if name == "ram" or "ram" in message else out


def _block(block: dict) -> str:
    also = "".join(f" {key} {value}" for key, value in block.items() if key not in ("name", "size"))
    return f"{block['name']} {block['size']}{also}"


def _command(message: dict) -> str:
    out = message["command"].upper().replace("-", "_")
    match message["command"]:
        case "ping":
            return f"{out} {message['value']:#x}"
        case "postcopy-advise" if "page-sizes" in message:
            return f"{out} page sizes {message['page-sizes']:#x}, " \
                   f"target page {message['target-page-size']}"  # fmt: skip
        case "postcopy-ram-discard":
            return f"{out} {message['block']}: {_ranges(message['ranges'])}"
        case "packaged":
            return f"{out} {message['length']} bytes:"
        case "recv-bitmap":
            return f"{out} {message['block']}"
        case "unknown":
            return f"command {message['number']:#x} of {message['length']} bytes, unknown"
    return out


def _ranges(ranges: list[dict]) -> str:
    shown = ", ".join(f"{r['start']:#x}+{r['length']:#x}" for r in ranges[:MOST_RANGES])
    more = len(ranges) - MOST_RANGES
    return shown + (f" and {more} more" if more > 0 else "")


def _subsection(message: dict) -> str:
    for key in ("target-page-bits", "uuid"):
        if key in message:
            return f"subsection {message['name']}: {message[key]}"
    return f"subsection {message['name']}: {', '.join(message.get('capabilities', ())) or 'none'}"


def _packet(message: dict) -> str:
    times = f" x {message['times']}" if message.get("times") else ""
    flags = f" {'+'.join(message['flags'])}" if message["flags"] else ""
    if "opaque" in message:
        return f"packet{flags} {message['name']!r} instance {message['instance-id']}: " \
               f"{message['opaque']} bytes opaque"  # fmt: skip
    return f"packet {message['number']}{times}{flags}: {_pages(message)}"


def _greeting(message: dict) -> str:
    return f"multifd channel {message['channel']} of {message['uuid']}"


def _description(message: dict) -> str:
    return f"VMDESCRIPTION of {message['length']} bytes, {len(message.get('devices', ()))} devices"


_WHAT = {
    "header": lambda m: f"{m['magic']} version {m['version']}",
    "configuration": lambda m: f"configuration: machine {m['machine']}",
    "subsection": _subsection,
    "section": _section,
    "command": _command,
    "opaque": lambda m: f"{m['opaque']} bytes that are no section of QEMU's",
    "eof": lambda m: "EOF",
    "vmdescription": _description,
    "multifd": _greeting,
    "packet": _packet,
}


def summary(blocks: Iterable[dict]) -> Iterator[str]:
    """A line for each block: what came of it."""
    for block in blocks:
        size = f"{block['size']} bytes" if "size" in block else "of unknown size"
        counts = [f"{block[kind]} {WORDS[kind]}" for kind in KINDS if kind in block]
        if "discarded-pages" in block:
            counts.append(
                f"{block['discarded-pages']} pages discarded in {block['discard-ranges']} ranges"
            )
        yield printable(f"{block['name']}, {size}: {', '.join(counts) or 'nothing'}")
