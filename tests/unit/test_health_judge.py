"""Alive, silent, or over its budget: the judgement over beats."""

from __future__ import annotations

from typing import Any

import pytest

from raycore.engine import EngineLoad
from raycore.health import EngineHealth, HealthLimits, Verdict, explain, judge, observe
from raycore.ids import EngineId, Incarnation, Rank
from raycore.messages import Beat

LIMITS = HealthLimits(hang_after_s=5, first_beat_s=20, grace_s=1)


def beat(seq: int, activity: str = "", busy_s: float = 0.0, budget_s: float = 0.0) -> Beat:
    return Beat(EngineId(Rank(0), Incarnation("i")), seq, seq, activity, busy_s, budget_s, EngineLoad())


def health(*beats: tuple[Beat, float]) -> EngineHealth:
    state = EngineHealth(100.0)
    for one, at_s in beats:
        state = observe(state, one, at_s)
    return state


@pytest.mark.parametrize(
    ("state", "now_s", "verdict"),
    [
        pytest.param(health(), 120.0, Verdict.ALIVE, id="before the first beat there is more patience"),
        pytest.param(health(), 120.1, Verdict.NO_BEATS, id="but not without end"),
        pytest.param(health((beat(1), 110.0)), 115.0, Verdict.ALIVE, id="a beat just in time"),
        pytest.param(health((beat(1), 110.0)), 115.1, Verdict.NO_BEATS, id="silence"),
        pytest.param(health((beat(1, "step", 3.0, 2.0), 110.0)), 110.0, Verdict.ALIVE, id="within budget and grace"),
        pytest.param(health((beat(1, "step", 3.1, 2.0), 110.0)), 110.0, Verdict.OVER_BUDGET, id="over budget and grace"),
        pytest.param(health((beat(1, "", 99.0, 0.0), 110.0)), 110.0, Verdict.ALIVE, id="idle is never over budget"),
        pytest.param(health((beat(1, "step", 9.0, 2.0), 110.0), (beat(2), 111.0)), 111.0, Verdict.ALIVE, id="it recovered"),
        pytest.param(health((beat(5), 110.0), (beat(4, "step", 9.0, 1.0), 114.0)), 115.1, Verdict.NO_BEATS, id="an older beat is no news"),
        pytest.param(health((beat(5), 110.0), (beat(5), 114.0)), 115.1, Verdict.NO_BEATS, id="a repeated beat is no news"),
        pytest.param(health((beat(1, "step", 9.0, 1.0), 110.0)), 116.0, Verdict.NO_BEATS, id="silence wins over an old budget"),
    ],
)
def test_the_verdict_follows_from_the_last_beat(state: EngineHealth, now_s: float, verdict: Verdict) -> None:
    assert judge(state, now_s, LIMITS) is verdict
    said = explain(state, verdict, now_s)
    assert said
    assert ("hung" in said) == (verdict is not Verdict.ALIVE)


@pytest.mark.parametrize("state", [health(), health((beat(1), 110.0))])
def test_a_cause_names_how_long_the_silence_is(state: Any) -> None:
    assert "20.5 s" in explain(state, Verdict.NO_BEATS, (state.last_beat_s or 100.0) + 20.5)
