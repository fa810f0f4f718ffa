"""THE state machine of an incoming postcopy migration, as one table.

Two words describe a migration.  `PostcopyState` is QEMU's (migration/postcopy-ram.h): it lives as
one atomic word in the control segment, and only the coordinator exchanges it.  `MigrationStatus` is
the one users see in `query-migrate`; it follows from what happens and never decides anything.

Rule 1: everything that decides what may come next is in TRANSITIONS.  A message that is not in the
table for the present state is a protocol error; there are no other checks of this kind anywhere.
Rule 2: the table knows messages, not bytes: whether one is well formed is the wire's business.

`Message` names what the stream can bring; commands carry QEMU's names without MIG_CMD_.
docs/states.md is drawn from this table (`tools/draw-states`).
"""

from __future__ import annotations

import enum

from sharded_pc.errors import RemoteProtocolError


class PostcopyState(enum.IntEnum):
    """QEMU's POSTCOPY_INCOMING_*, same numbers."""

    NONE = 0
    ADVISE = 1
    DISCARD = 2
    LISTENING = 3
    RUNNING = 4
    END = 5


class MigrationStatus(enum.Enum):
    """QEMU's MigrationStatus (qapi/migration.json); the order is the control segment's index."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def number(self) -> int:
        return list(MigrationStatus).index(self)

    @classmethod
    def numbered(cls, number: int) -> MigrationStatus:
        return list(cls)[number]


class Message(enum.Enum):
    """What the stream can bring, in the order of a migration's life."""

    OPEN_RETURN_PATH = "OPEN_RETURN_PATH"
    PING = "PING"
    POSTCOPY_ADVISE = "POSTCOPY_ADVISE"
    RAM_SETUP = "ram START section"
    RAM_PRECOPY = "ram PART section"
    RAM_END = "ram END section"
    DEVICES = "device state outside a package"
    VMDESCRIPTION = "VMDESCRIPTION"
    SWITCHOVER_START = "SWITCHOVER_START"
    POSTCOPY_RAM_DISCARD = "POSTCOPY_RAM_DISCARD"
    PACKAGED = "PACKAGED"
    POSTCOPY_LISTEN = "POSTCOPY_LISTEN"
    PACKAGED_DEVICES = "device state inside a package"
    POSTCOPY_RUN = "POSTCOPY_RUN"
    RECV_BITMAP = "RECV_BITMAP"
    POSTCOPY_RESUME = "POSTCOPY_RESUME"
    EOF = "EOF"


_S, _M = PostcopyState, Message
_PRE = (_S.NONE, _S.ADVISE)
_INCOMING = (_S.NONE, _S.ADVISE, _S.DISCARD, _S.LISTENING, _S.RUNNING)


def _stay(states: tuple[PostcopyState, ...], *messages: Message):
    return {(state, message): state for message in messages for state in states}


TRANSITIONS: dict[tuple[PostcopyState, Message], PostcopyState] = {
    **_stay(_INCOMING, _M.PING),
    **_stay(_PRE, _M.OPEN_RETURN_PATH, _M.RAM_SETUP, _M.DEVICES, _M.VMDESCRIPTION, _M.EOF),
    **_stay((*_PRE, _S.DISCARD), _M.SWITCHOVER_START),
    **_stay((*_PRE, _S.LISTENING, _S.RUNNING), _M.RAM_PRECOPY, _M.RAM_END),
    (_S.NONE, _M.POSTCOPY_ADVISE): _S.ADVISE,
    (_S.ADVISE, _M.POSTCOPY_RAM_DISCARD): _S.DISCARD,
    (_S.DISCARD, _M.POSTCOPY_RAM_DISCARD): _S.DISCARD,
    **_stay((_S.ADVISE, _S.DISCARD), _M.PACKAGED),
    (_S.ADVISE, _M.POSTCOPY_LISTEN): _S.LISTENING,
    (_S.DISCARD, _M.POSTCOPY_LISTEN): _S.LISTENING,
    (_S.LISTENING, _M.PACKAGED_DEVICES): _S.LISTENING,
    (_S.LISTENING, _M.POSTCOPY_RUN): _S.RUNNING,
    **_stay((_S.RUNNING,), _M.RECV_BITMAP, _M.POSTCOPY_RESUME),
    (_S.RUNNING, _M.EOF): _S.END,
}
"""(state, message) -> next state.  What is not here is an error."""


def advance(state: PostcopyState, message: Message) -> PostcopyState:
    """The state after `message`; RemoteProtocolError if it is not legal in `state`."""
    try:
        return TRANSITIONS[state, message]
    except KeyError:
        legal = ", ".join(m.value for m in Message if (state, m) in TRANSITIONS) or "nothing"
        raise RemoteProtocolError(
            f"{message.value} is not legal here (expected {legal})", state=state.name
        ) from None


def advised(state: PostcopyState) -> bool:
    """The source may switch to postcopy, or has."""
    return PostcopyState.ADVISE <= state <= PostcopyState.RUNNING


def listening(state: PostcopyState) -> bool:
    """Placement must be atomic: a guest may be looking."""
    return PostcopyState.LISTENING <= state <= PostcopyState.RUNNING


def markdown() -> str:
    """The table and its diagram for docs/states.md."""
    moves = sorted(TRANSITIONS.items(), key=lambda kv: (kv[0][0], list(Message).index(kv[0][1])))
    lines = [
        "# States of an incoming migration",
        "",
        "Drawn from `sharded_pc/state.py` by `tools/draw-states`; a test holds them equal.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> NONE",
        *(f"    {s.name} --> {t.name}: {m.value}" for (s, m), t in moves if s != t),
        "    END --> [*]",
        "```",
        "",
        "A migration that completes in precopy ends where it is, in NONE or ADVISE, as in QEMU.",
        "",
        "| message | " + " | ".join(s.name for s in PostcopyState) + " |",
        "|---|" + "---|" * len(PostcopyState),
    ]
    for message in Message:
        cells = [TRANSITIONS.get((s, message)) for s in PostcopyState]
        row = (c.name if c is not None else "error" for c in cells)
        lines.append(f"| {message.value} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"
