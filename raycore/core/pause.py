"""The pause state of one engine core. Pure: events in, new state and commands out.

By one rank alone (`rank=`):

            pause(abort|keep)                 pause(wait), still running
RUNNING ──────────────────────▶ PAUSED   RUNNING ───────────────▶ PAUSING
PAUSING ── idle ──▶ PAUSED (waiting calls complete)
PAUSING ── pause(abort|keep) ──▶ PAUSED (waiting calls complete)
PAUSING ── every waiting call withdrawn ──▶ RUNNING        undo of pause(wait)
PAUSED  ── resume ──▶ RUNNING;  RUNNING ── resume ──▶ RUNNING (harmless);  PAUSING ── resume ──▶ error

By a client over all ranks, in two phases (`raycore/client/pause_plan.py` is the other side):

free ── prepare ──▶ held by this operation; wait also: RUNNING ──▶ PAUSING
held ── drain ──▶ held; the answer comes when the engine is idle
held ── prepare, or a pause or resume of one rank ──▶ refused
held ── undo, its call withdrawn, its session ended ──▶ free, state as before it          undo of prepare
held, free ── commit with a higher stamp ──▶ free, PAUSED or RUNNING as decided; an equal or lower stamp: nothing (done or overtaken)
held ── commit of another operation ──▶ refused
"""

from __future__ import annotations

import enum
from typing import Any, Literal

import msgspec

PauseMode = Literal["abort", "wait", "keep"]


class PauseState(enum.Enum):
    """Whether the engine core steps, and whether it gives new requests to its engine."""

    RUNNING = "running"
    PAUSING = "pausing"
    """Running requests go on; new ones are held."""
    PAUSED = "paused"
    """No step runs; new requests are held."""


class Hold(msgspec.Struct, frozen=True):
    """An operation over all ranks that has prepared here and is not decided yet."""

    operation: str
    owner: Any
    """The session that asked; its end undoes the hold."""
    client: str
    before: PauseState
    waiting: Any = None
    """The drain call that is answered when the engine is idle."""


class Pause(msgspec.Struct, frozen=True):
    """State, the tokens of the calls that wait for it to become PAUSED, and what the fleet decided or is about to.

    `stamp`: the last decision over all ranks that was carried out here, `2 * count + paused`; the highest one of a fleet is the true one.
    """

    state: PauseState = PauseState.RUNNING
    waiting: tuple[Any, ...] = ()
    hold: Hold | None = None
    stamp: int = 0


class PauseStep(msgspec.Struct, frozen=True):
    """What follows from an event: the new state, and what the core must do."""

    pause: Pause
    abort_running: bool = False
    completed: tuple[Any, ...] = ()
    """Calls whose pause is complete."""
    release_held: bool = False
    """Give the held requests to the engine."""
    is_refused: bool = False
    """Another operation is in the way: see `is_draining`."""
    is_deferred: bool = False
    """The call is answered when it is among `completed` of a later step."""


class PauseConflictError(RuntimeError):
    """A pause of other callers is in progress here; nothing was changed."""


def on_pause(pause: Pause, mode: PauseMode, call: object, *, has_work: bool) -> PauseStep:
    """A pause call for this rank alone arrived."""
    _refuse_where_held(pause)
    if mode == "wait" and has_work and pause.state is not PauseState.PAUSED:
        return PauseStep(_with(pause, PauseState.PAUSING, (*pause.waiting, call)))
    completed = (*pause.waiting, call)
    return PauseStep(_with(pause, PauseState.PAUSED), abort_running=mode == "abort", completed=completed)


def on_idle(pause: Pause) -> PauseStep:
    """The engine has no work left."""
    if pause.state is not PauseState.PAUSING:
        return PauseStep(pause)
    hold = pause.hold
    if hold is None:
        return PauseStep(_with(pause, PauseState.PAUSED), completed=pause.waiting)
    if hold.waiting is None:
        return PauseStep(pause)
    return PauseStep(msgspec.structs.replace(pause, hold=msgspec.structs.replace(hold, waiting=None)), completed=(hold.waiting,))


def on_withdrawn(pause: Pause, call: object) -> PauseStep:
    """A caller no longer waits for its pause; when nobody does, the pause is undone."""
    hold = pause.hold
    if hold is not None and hold.waiting == call:
        return on_undo(pause, hold.operation)
    if pause.state is not PauseState.PAUSING or call not in pause.waiting:
        return PauseStep(pause)
    waiting = tuple(other for other in pause.waiting if other != call)
    if waiting:
        return PauseStep(_with(pause, PauseState.PAUSING, waiting))
    return PauseStep(_with(pause, PauseState.RUNNING), release_held=True)


def on_resume(pause: Pause) -> PauseStep:
    """A resume call for this rank alone arrived."""
    _refuse_where_held(pause)
    if pause.state is PauseState.PAUSING:
        msg = "a pause still waits for running requests; resume after it has completed"
        raise PauseConflictError(msg)
    return PauseStep(_with(pause, PauseState.RUNNING), release_held=pause.state is PauseState.PAUSED)


def on_prepare(pause: Pause, hold: Hold, mode: PauseMode | None) -> PauseStep:
    """A client is about to pause (`mode`) or resume (None) all ranks; `hold.before` is filled in here."""
    if pause.hold is not None or pause.state is PauseState.PAUSING:
        return PauseStep(pause, is_refused=True)
    state = PauseState.PAUSING if mode == "wait" and pause.state is PauseState.RUNNING else pause.state
    return PauseStep(msgspec.structs.replace(pause, state=state, hold=msgspec.structs.replace(hold, before=pause.state)))


def on_drain(pause: Pause, operation: str, call: object, *, has_work: bool) -> PauseStep:
    """The operation that has prepared wants to know when running requests have ended."""
    hold = pause.hold
    if hold is None or hold.operation != operation or hold.waiting is not None:
        return PauseStep(pause, is_refused=True)
    if pause.state is PauseState.PAUSED or not has_work:
        return PauseStep(pause)
    hold = msgspec.structs.replace(hold, waiting=call)
    return PauseStep(msgspec.structs.replace(pause, hold=hold), is_deferred=True)


def on_undo(pause: Pause, operation: str) -> PauseStep:
    """The operation will not be carried out: as if it had never been prepared."""
    hold = pause.hold
    if hold is None or hold.operation != operation:
        return PauseStep(pause)
    was_draining = pause.state is not hold.before
    return PauseStep(msgspec.structs.replace(pause, state=hold.before, hold=None), release_held=was_draining)


def on_owner_gone(pause: Pause, owner: object) -> PauseStep:
    """A session ended; what it prepared is undone."""
    hold = pause.hold
    return on_undo(pause, hold.operation) if hold is not None and hold.owner == owner else PauseStep(pause)


def on_commit(pause: Pause, operation: str, stamp: int, *, abort: bool) -> PauseStep:
    """A decision over all ranks: `stamp` says which state; `abort`: end running requests first.

    It need not have been prepared here: a rank that missed it is told by whoever notices.
    """
    if stamp <= pause.stamp:
        return PauseStep(pause)
    hold = pause.hold
    if (hold is not None and hold.operation != operation) or (pause.waiting and not stamp & 1):
        return PauseStep(pause, is_refused=True)
    completed = pause.waiting if hold is None or hold.waiting is None else (*pause.waiting, hold.waiting)
    if stamp & 1:
        return PauseStep(Pause(PauseState.PAUSED, stamp=stamp), abort_running=abort, completed=completed)
    return PauseStep(Pause(stamp=stamp), completed=completed, release_held=pause.state is not PauseState.RUNNING)


def is_draining(pause: Pause) -> bool:
    """Whether a pause waits for running requests, which may take long."""
    return pause.state is PauseState.PAUSING


def _with(pause: Pause, state: PauseState, waiting: tuple[Any, ...] = ()) -> Pause:
    return msgspec.structs.replace(pause, state=state, waiting=waiting)


def _refuse_where_held(pause: Pause) -> None:
    if pause.hold is not None:
        msg = f"{pause.hold.client} is pausing or resuming all ranks; wait until that has completed"
        raise PauseConflictError(msg)
