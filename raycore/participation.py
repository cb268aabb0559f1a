"""One engine core's part in scaling operations: what it was asked, what it answered, what it must refuse. Pure.

NONE ── prepare ──▶ PREPARING ── all is built ──▶ READY ── decided ──▶ DECIDED ── told to go ──▶ GONE ── all confirmed ──▶ NONE
PREPARING, READY ── undo ──▶ NONE                                  what was built is dropped
PREPARING, READY ── prepare of another operation, in this term or a higher one ──▶ PREPARING    its undo was lost; dropped
PREPARING, READY, DECIDED ── told of another topology ──▶ NONE     a death, or a new controller that found nothing decided; dropped
GONE ── told of another topology ──▶ NONE                          the switch is behind it, or came to nothing
any ── a lower term, an operation that was undone, one that is not known ──▶ refused, unchanged
"""

from __future__ import annotations

import enum

import msgspec

from raycore.errors import ScalingError
from raycore.ids import GroupStamp, Term

_UNDONE_KEPT = 32
"""An undo may overtake its prepare; so many are remembered."""


class Stage(enum.IntEnum):
    """How far an operation has come here."""

    NONE = 0
    PREPARING = 1
    READY = 2
    DECIDED = 3
    """It holds the decision, which it does not undo of itself."""
    GONE = 4
    """Told to go: it votes for the switch, or has made it."""


class Participation(msgspec.Struct, frozen=True):
    """`term`: the highest that was heard of; who says less is fenced."""

    term: Term = Term(0)
    operation: str = ""
    stamp: GroupStamp = GroupStamp()
    stage: Stage = Stage.NONE
    undone: tuple[str, ...] = ()


class Part(msgspec.Struct, frozen=True):
    """What follows from a message: the new state, and what is to be done."""

    state: Participation
    builds: bool = False
    drops: GroupStamp | None = None
    """Let go of what was prepared under this stamp."""


def on_prepare(state: Participation, operation: str, term: Term, stamp: GroupStamp) -> Part:
    """Asked to prepare; asked again, it goes on as it is. ScalingError when it must not."""
    _fence(state, operation, term)
    if operation in state.undone:
        raise ScalingError(f"operation {operation} was undone here", operation=operation)
    if state.operation == operation and state.stamp == stamp and state.stage is not Stage.NONE:
        return Part(msgspec.structs.replace(state, term=term))
    if state.stage is Stage.DECIDED:
        raise ScalingError(f"operation {state.operation} is decided here; {operation} must wait", operation=operation)
    return Part(Participation(term, operation, stamp, Stage.PREPARING, state.undone), builds=True, drops=_droppable(state))


def on_built(state: Participation, operation: str, stamp: GroupStamp) -> Part:
    """All is built. ScalingError when it was undone meanwhile."""
    if (state.operation, state.stamp) != (operation, stamp) or state.stage is not Stage.PREPARING:
        raise ScalingError(f"operation {operation} was undone while this rank prepared", operation=operation)
    return Part(msgspec.structs.replace(state, stage=Stage.READY))


def on_undo(state: Participation, operation: str, term: Term) -> Part:
    """Undone; known or not, it is not begun after this. ScalingError when it is decided here."""
    _fence(state, operation, term)
    if state.operation == operation and state.stage in (Stage.DECIDED, Stage.GONE):
        raise ScalingError(f"operation {operation} is decided here and cannot be undone", operation=operation)
    undone = (*(other for other in state.undone if other != operation), operation)[-_UNDONE_KEPT:]
    if state.operation != operation:
        return Part(msgspec.structs.replace(state, term=term, undone=undone))
    return Part(Participation(term, undone=undone), drops=_droppable(state))


def on_decided(state: Participation, operation: str, term: Term, stamp: GroupStamp) -> Part:
    """The decision, to be kept. ScalingError unless this rank is ready for it."""
    _fence(state, operation, term)
    if (state.operation, state.stamp) != (operation, stamp) or state.stage not in (Stage.READY, Stage.DECIDED):
        raise ScalingError(f"operation {operation} is not prepared here ({state.stage.name.lower()})", operation=operation)
    return Part(msgspec.structs.replace(state, term=term, stage=Stage.DECIDED))


def on_told(state: Participation, term: Term, stamp: GroupStamp | None, *, is_new: bool) -> Part:
    """A newer membership, whose groups have this stamp; `is_new`: they are not those that this rank has already."""
    state = msgspec.structs.replace(state, term=max(state.term, term))
    if state.stage is Stage.NONE:
        return Part(state)
    if stamp == state.stamp:
        return Part(msgspec.structs.replace(state, stage=Stage.GONE))
    if not is_new and term == state.stamp.term:
        return Part(state)  # other states of the same members: no other topology
    dropped = Participation(state.term, undone=state.undone)
    return Part(dropped, drops=_droppable(state))


def on_released(state: Participation, stamp: GroupStamp) -> Part:
    """Every member has confirmed."""
    if state.stamp != stamp or state.stage is not Stage.GONE:
        return Part(state)
    return Part(Participation(state.term, undone=state.undone))


def _fence(state: Participation, operation: str, term: Term) -> None:
    if term < state.term:
        raise ScalingError(f"operation {operation} of term {term}: a controller of term {state.term} has taken over", operation=operation)


def _droppable(state: Participation) -> GroupStamp | None:
    return state.stamp if state.stage in (Stage.PREPARING, Stage.READY, Stage.DECIDED) else None
