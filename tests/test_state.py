"""The state table against a small model of QEMU's, written from its documents and source."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sharded_pc import state as states
from sharded_pc.errors import RemoteProtocolError
from sharded_pc.state import Message, MigrationStatus, PostcopyState, advance

DOCUMENT = Path(__file__).parent.parent / "docs" / "states.md"


class Qemu:
    """migration/savevm.c loadvm_postcopy_handle_* (facts-qemu.md 3), in its own words.

    None: not legal.  Numbers are POSTCOPY_INCOMING_*.
    """

    def __init__(self) -> None:
        self.state = 0

    def _may_begin_postcopy(self) -> bool:
        return self.state in (1, 2)

    def _still_precopy(self) -> bool:
        return self.state < 2

    def next(self, message: Message) -> int | None:
        s = self.state
        match message:
            case Message.POSTCOPY_ADVISE:
                return 1 if s == 0 else None
            case Message.POSTCOPY_RAM_DISCARD:
                return 2 if self._may_begin_postcopy() else None
            case Message.PACKAGED:
                return s if self._may_begin_postcopy() else None
            case Message.POSTCOPY_LISTEN:
                return 3 if self._may_begin_postcopy() else None
            case Message.PACKAGED_DEVICES:
                return 3 if s == 3 else None
            case Message.POSTCOPY_RUN:
                return 4 if s == 3 else None
            case Message.EOF:
                return 5 if s == 4 else s if self._still_precopy() else None
            case Message.RAM_PRECOPY | Message.RAM_END:
                # LISTEN gives the wire to a thread of its own, while devices load.
                return s if self._still_precopy() or s in (3, 4) else None
            case Message.SWITCHOVER_START:
                return s if s < 3 else None
            case Message.RECV_BITMAP | Message.POSTCOPY_RESUME:
                return s if s == 4 else None  # a pause keeps it
            case Message.PING:
                return s if s < 5 else None
            case _:  # set-up, and the ways in which precopy ends
                return s if self._still_precopy() else None


class Migration(RuleBasedStateMachine):
    """Any messages in any order: the table and the model agree, and go on after an error."""

    def __init__(self) -> None:
        super().__init__()
        self.qemu = Qemu()
        self.state = PostcopyState.NONE

    @rule(message=st.sampled_from(Message))
    def receive(self, message: Message) -> None:
        want = self.qemu.next(message)
        if want is None:
            self._refused(message)
            return
        self.state = advance(self.state, message)
        self.qemu.state = want

    def _refused(self, message: Message) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            advance(self.state, message)
        assert str(caught.value).startswith(f"{message.value} is not legal here (expected ")
        assert str(caught.value).endswith(f" in postcopy state {self.state.name}")
        assert caught.value.state == self.state.name

    @rule(message=st.sampled_from(Message))
    def go_on(self, message: Message) -> None:
        """A legal message if there is one, so that walks get far."""
        legal = [m for m in Message if self.qemu.next(m) not in (None, self.qemu.state)]
        if legal:
            self.receive(legal[list(Message).index(message) % len(legal)])

    @invariant()
    def same_state(self) -> None:
        assert self.state == self.qemu.state
        assert states.advised(self.state) == (1 <= self.qemu.state <= 4)
        assert states.listening(self.state) == (3 <= self.qemu.state <= 4)


TestMigration = Migration.TestCase
TestMigration.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("message", Message, ids=lambda m: m.name)
@pytest.mark.parametrize("state", PostcopyState, ids=lambda s: s.name)
def test_every_cell(state: PostcopyState, message: Message) -> None:
    """The table is small: all of it, too."""
    qemu = Qemu()
    qemu.state = state
    assert states.TRANSITIONS.get((state, message)) == qemu.next(message)


def test_error_lists_what_is_legal() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        advance(PostcopyState.DISCARD, Message.EOF)
    assert str(caught.value) == (
        "EOF is not legal here (expected PING, SWITCHOVER_START, POSTCOPY_RAM_DISCARD, "
        "PACKAGED, POSTCOPY_LISTEN) in postcopy state DISCARD"
    )
    with pytest.raises(RemoteProtocolError, match="expected nothing"):
        advance(PostcopyState.END, Message.PING)


def test_numbers_are_qemus() -> None:
    names = ["NONE", "ADVISE", "DISCARD", "LISTENING", "RUNNING", "END"]
    assert [state.name for state in sorted(PostcopyState)] == names
    assert list(map(int, sorted(PostcopyState))) == list(range(6))


@pytest.mark.parametrize("status", MigrationStatus, ids=lambda s: s.value)
def test_status_numbers_round_trip(status: MigrationStatus) -> None:
    assert MigrationStatus.numbered(status.number) is status


def test_document_is_drawn_from_the_table() -> None:
    assert DOCUMENT.read_text() == states.markdown(), "tools/draw-states"
