"""One pause or resume over all ranks, as one client drives it. Pure: events in, new plan and orders out.

LOCKING    ── the lowest rank has prepared ──▶ PREPARING: all others are asked      two clients meet at one rank, so one of them wins
LOCKING    ── that rank is dead ──▶ LOCKING: the next one is asked
PREPARING  ── all have prepared (the dead aside) ──▶ DRAINING (mode wait): all are asked to say when their requests have ended
PREPARING, DRAINING ── all have answered ──▶ COMMITTING: the decision goes to all
LOCKING, PREPARING, DRAINING ── a refusal, an error, a lost session, the deadline ──▶ ENDED      undo: every rank that was asked is told
COMMITTING ── all have carried it out (the dead aside) ──▶ ENDED
COMMITTING ── a rank's session is lost, or another operation is in its way ──▶ COMMITTING: the decision goes to it again
COMMITTING ── the deadline ──▶ RESTORING: the opposite decision, a stamp higher, goes to all             undo of commit
RESTORING  ── all have carried it out (the dead aside) ──▶ ENDED
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from raycore.operations import PauseReport


class Phase(enum.Enum):
    """How far it has come."""

    LOCKING = "locking"
    PREPARING = "preparing"
    DRAINING = "draining"
    COMMITTING = "committing"
    RESTORING = "restoring"
    ENDED = "ended"


class Ending(enum.Enum):
    """What the caller is told."""

    DONE = "done"
    BUSY = "busy"
    """Another operation is in progress; it ends soon."""
    DRAINING = "draining"
    """Another one waits for running requests."""
    FAILED = "failed"
    """A rank could not take part, or the deadline passed."""
    DEAD = "dead"
    """No rank is left."""


class Order(msgspec.Struct, frozen=True):
    """Send this to a rank."""

    rank: int
    phase: Literal["prepare", "drain", "commit", "undo"]
    stamp: int = 0
    is_repeat: bool = False
    """It did not get through before: wait a moment first."""


class PausePlan(msgspec.Struct, frozen=True):
    """One operation of one client."""

    is_pause: bool
    is_waiting: bool
    """A pause that lets running requests finish."""
    phase: Phase
    unasked: tuple[int, ...] = ()
    """Ranks that have not been asked to prepare."""
    asked: frozenset[int] = frozenset()
    """Ranks that may hold something of this operation."""
    pending: frozenset[int] = frozenset()
    """Ranks whose answer to the present phase is missing."""
    highest: int = 0
    """The highest stamp that a rank reported: what the fleet had decided before."""
    stamp: int = 0
    has_committed: bool = False


class PlanStep(msgspec.Struct, frozen=True):
    """The new plan, what to send, and once: how it ended for its caller."""

    plan: PausePlan
    orders: tuple[Order, ...] = ()
    ending: Ending | None = None


def begin(ranks: tuple[int, ...], *, is_pause: bool, is_waiting: bool = False) -> PlanStep:
    """Over these ranks, the lowest first; at least one."""
    return _ask_first(PausePlan(is_pause, is_waiting, Phase.LOCKING, tuple(sorted(ranks))))


def on_report(plan: PausePlan, rank: int, report: PauseReport) -> PlanStep:
    """A rank answered the order of the present phase."""
    if rank not in plan.pending:
        return PlanStep(plan)
    match plan.phase:
        case Phase.LOCKING | Phase.PREPARING | Phase.DRAINING:
            return _on_prepared(plan, rank, report)
        case Phase.COMMITTING | Phase.RESTORING:
            return _on_carried_out(plan, rank, report)
        case Phase.ENDED:
            return PlanStep(plan)


def _on_prepared(plan: PausePlan, rank: int, report: PauseReport) -> PlanStep:
    replace = msgspec.structs.replace
    if not report.is_granted:
        ending = Ending.DRAINING if report.is_draining else Ending.BUSY
        return _undo(replace(plan, asked=plan.asked - {rank}), ending)
    return _go_on(replace(plan, pending=plan.pending - {rank}, highest=max(plan.highest, report.stamp)))


def _on_carried_out(plan: PausePlan, rank: int, report: PauseReport) -> PlanStep:
    if not report.is_granted:
        return PlanStep(plan, (Order(rank, "commit", plan.stamp, is_repeat=True),))
    if report.stamp < plan.stamp:  # the answer to the decision that is being taken back
        return PlanStep(plan)
    return _committed(msgspec.structs.replace(plan, pending=plan.pending - {rank}, has_committed=True))


def on_gone(plan: PausePlan, rank: int) -> PlanStep:
    """A rank is dead: the others decide without it."""
    plan = msgspec.structs.replace(
        plan, asked=plan.asked - {rank}, pending=plan.pending - {rank}, unasked=tuple(r for r in plan.unasked if r != rank)
    )
    match plan.phase:
        case Phase.LOCKING:
            if plan.asked:
                return PlanStep(plan)
            return _ask_first(plan) if plan.unasked else _end(plan, Ending.DEAD)
        case Phase.PREPARING | Phase.DRAINING:
            return _go_on(plan) if plan.asked else _end(plan, Ending.DEAD)
        case Phase.COMMITTING | Phase.RESTORING:
            return _committed(plan)
        case Phase.ENDED:
            return PlanStep(plan)


def on_failed(plan: PausePlan, rank: int) -> PlanStep:
    """An order had no answer although its rank may live: the session was lost, or the rank refused the call."""
    if rank not in plan.pending:
        return PlanStep(plan)
    match plan.phase:
        case Phase.LOCKING | Phase.PREPARING | Phase.DRAINING:
            return _undo(plan, Ending.FAILED)
        case Phase.COMMITTING | Phase.RESTORING:
            return PlanStep(plan, (Order(rank, "commit", plan.stamp, is_repeat=True),))
        case Phase.ENDED:
            return PlanStep(plan)


def on_expired(plan: PausePlan) -> PlanStep:
    """The caller's deadline has passed, or it does not wait any more."""
    match plan.phase:
        case Phase.LOCKING | Phase.PREPARING | Phase.DRAINING:
            return _undo(plan, Ending.FAILED)
        case Phase.COMMITTING:
            stamp = next_stamp(plan.stamp, is_paused=bool(plan.highest & 1))
            plan = msgspec.structs.replace(plan, phase=Phase.RESTORING, stamp=stamp, pending=plan.asked)
            return PlanStep(plan, tuple(Order(rank, "commit", stamp) for rank in sorted(plan.asked)), Ending.FAILED)
        case Phase.RESTORING | Phase.ENDED:
            return PlanStep(plan)


def next_stamp(stamp: int, *, is_paused: bool) -> int:
    """The stamp of a decision that follows `stamp`."""
    return 2 * ((stamp >> 1) + 1) + is_paused


def _ask_first(plan: PausePlan) -> PlanStep:
    first, *rest = plan.unasked
    asked = frozenset({first})
    plan = msgspec.structs.replace(plan, unasked=tuple(rest), asked=asked, pending=asked)
    return PlanStep(plan, (Order(first, "prepare"),))


def _go_on(plan: PausePlan) -> PlanStep:
    """After an answer, or a death, before the decision."""
    replace = msgspec.structs.replace
    if plan.unasked:
        rest = frozenset(plan.unasked)
        plan = replace(plan, phase=Phase.PREPARING, unasked=(), asked=plan.asked | rest, pending=plan.pending | rest)
        return PlanStep(plan, tuple(Order(rank, "prepare") for rank in sorted(rest)))
    if plan.pending:
        return PlanStep(plan)
    if plan.is_waiting and plan.phase is not Phase.DRAINING:
        plan = replace(plan, phase=Phase.DRAINING, pending=plan.asked)
        return PlanStep(plan, tuple(Order(rank, "drain") for rank in sorted(plan.asked)))
    stamp = next_stamp(plan.highest, is_paused=plan.is_pause)
    plan = replace(plan, phase=Phase.COMMITTING, stamp=stamp, pending=plan.asked)
    return PlanStep(plan, tuple(Order(rank, "commit", stamp) for rank in sorted(plan.asked)))


def _committed(plan: PausePlan) -> PlanStep:
    if plan.pending:
        return PlanStep(plan)
    if plan.phase is Phase.RESTORING:
        return PlanStep(msgspec.structs.replace(plan, phase=Phase.ENDED))  # its caller was told before
    return _end(plan, Ending.DONE if plan.has_committed else Ending.DEAD)


def _undo(plan: PausePlan, ending: Ending) -> PlanStep:
    orders = tuple(Order(rank, "undo") for rank in sorted(plan.asked))
    return PlanStep(msgspec.structs.replace(plan, phase=Phase.ENDED, pending=frozenset()), orders, ending)


def _end(plan: PausePlan, ending: Ending) -> PlanStep:
    return PlanStep(msgspec.structs.replace(plan, phase=Phase.ENDED), ending=ending)
