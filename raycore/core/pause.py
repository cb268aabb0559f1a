"""The pause state of one engine core. Pure: events in, new state and commands out.

            pause(abort|keep)                 pause(wait), still running
RUNNING ──────────────────────▶ PAUSED   RUNNING ───────────────▶ PAUSING
PAUSING ── idle ──▶ PAUSED (waiting calls complete)
PAUSING ── pause(abort|keep) ──▶ PAUSED (waiting calls complete)
PAUSING ── every waiting call withdrawn ──▶ RUNNING        undo of pause(wait)
PAUSED  ── resume ──▶ RUNNING;  RUNNING ── resume ──▶ RUNNING (harmless);  PAUSING ── resume ──▶ error
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


class Pause(msgspec.Struct, frozen=True):
    """State, and the tokens of the calls that wait for it to become PAUSED."""

    state: PauseState = PauseState.RUNNING
    waiting: tuple[Any, ...] = ()


class PauseStep(msgspec.Struct, frozen=True):
    """What follows from an event: the new state, and what the core must do."""

    pause: Pause
    abort_running: bool = False
    completed: tuple[Any, ...] = ()
    """Calls whose pause is complete."""
    release_held: bool = False
    """Give the held requests to the engine."""


class ResumeBeforePausedError(RuntimeError):
    """resume was called while a pause still waits for running requests."""


def on_pause(pause: Pause, mode: PauseMode, call: object, *, has_work: bool) -> PauseStep:
    """A pause call arrived."""
    if mode == "wait" and has_work and pause.state is not PauseState.PAUSED:
        return PauseStep(Pause(PauseState.PAUSING, (*pause.waiting, call)))
    completed = (*pause.waiting, call)
    return PauseStep(Pause(PauseState.PAUSED), abort_running=mode == "abort", completed=completed)


def on_idle(pause: Pause) -> PauseStep:
    """The engine has no work left."""
    if pause.state is not PauseState.PAUSING:
        return PauseStep(pause)
    return PauseStep(Pause(PauseState.PAUSED), completed=pause.waiting)


def on_withdrawn(pause: Pause, call: object) -> PauseStep:
    """A caller no longer waits for its pause; when nobody does, the pause is undone."""
    if pause.state is not PauseState.PAUSING or call not in pause.waiting:
        return PauseStep(pause)
    waiting = tuple(other for other in pause.waiting if other != call)
    if waiting:
        return PauseStep(Pause(PauseState.PAUSING, waiting))
    return PauseStep(Pause(), release_held=True)


def on_resume(pause: Pause) -> PauseStep:
    """A resume call arrived."""
    if pause.state is PauseState.PAUSING:
        msg = "a pause still waits for running requests; resume after it has completed"
        raise ResumeBeforePausedError(msg)
    return PauseStep(Pause(), release_held=pause.state is PauseState.PAUSED)
