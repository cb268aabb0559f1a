"""Whether an engine core is alive, suspect or hung, from its beats and its declared budgets. Pure."""

from __future__ import annotations

import enum

import msgspec

from raycore.messages import Beat


class Verdict(enum.StrEnum):
    """What the signals say."""

    ALIVE = "alive"
    NO_BEATS = "no beats"
    OVER_BUDGET = "over budget"


class HealthLimits(msgspec.Struct, frozen=True):
    """When silence is a hang. `hang_after_s`: no beat for this long. `grace_s`: added to every declared budget."""

    hang_after_s: float = 5.0
    first_beat_s: float = 20.0
    grace_s: float = 1.0


class EngineHealth(msgspec.Struct, frozen=True):
    """What is known of one engine's beats; times are the observer's monotonic clock."""

    watched_since_s: float
    last_beat_s: float | None = None
    beat: Beat | None = None


def observe(state: EngineHealth, beat: Beat, now_s: float) -> EngineHealth:
    """Take in a beat; an older one than the last (by `seq`) changes nothing."""
    if state.beat is not None and beat.seq <= state.beat.seq:
        return state
    return EngineHealth(watched_since_s=state.watched_since_s, last_beat_s=now_s, beat=beat)


def judge(state: EngineHealth, now_s: float, limits: HealthLimits) -> Verdict:
    """The verdict at `now_s`."""
    if state.last_beat_s is None:
        silent_for = now_s - state.watched_since_s
        return Verdict.NO_BEATS if silent_for > limits.first_beat_s else Verdict.ALIVE
    if now_s - state.last_beat_s > limits.hang_after_s:
        return Verdict.NO_BEATS
    beat = state.beat
    if beat is not None and beat.activity and beat.busy_s > beat.budget_s + limits.grace_s:
        return Verdict.OVER_BUDGET
    return Verdict.ALIVE


def explain(state: EngineHealth, verdict: Verdict, now_s: float) -> str:
    """The verdict in words for a person: cause of a fencing."""
    match verdict:
        case Verdict.ALIVE:
            return "alive"
        case Verdict.NO_BEATS:
            silent_for = now_s - (state.watched_since_s if state.last_beat_s is None else state.last_beat_s)
            return f"hung: no beat for {silent_for:.1f} s"
        case Verdict.OVER_BUDGET:
            beat = state.beat
            if beat is None:
                return "hung: over its budget"
            return f"hung: {beat.activity} has taken {beat.busy_s:.1f} s, over its budget of {beat.budget_s:.1f} s"
