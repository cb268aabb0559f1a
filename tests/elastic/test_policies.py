"""Autoscaling decisions: constant work settles, bursts are met at once, and nothing goes to and fro."""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from elastic.policies import Bounds, Decision, Highest, Observation, Proposal, Resize, ScalingPolicy, TargetWork, decide, make_policy
from raycore.errors import ConfigurationError

WORK = TargetWork(requests_per_rank=10, grow_window_s=30, shrink_window_s=60, panic_window_s=6)
WIDE = Bounds(max_ranks=64)


def follow(
    policy: ScalingPolicy,
    requests: Callable[[float], float],
    *,
    ranks: int,
    seconds: int,
    bounds: Bounds = WIDE,
    resize_s: float = 10.0,
) -> tuple[list[int], list[Resize]]:
    """Observe once a second and do what is decided, each resize taking `resize_s`; the size each second, and the resizes."""
    window: list[Observation] = []
    done: list[Resize] = []
    sizes: list[int] = []
    running: tuple[float, int] | None = None
    for at in range(seconds):
        if running is not None and at >= running[0] + resize_s:
            done.append(Resize(float(at), ranks, running[1], resize_s))
            ranks, running = running[1], None
        window = [seen for seen in window if seen.at_s > at - policy.window_s]
        window.append(Observation(at_s=float(at), ranks=ranks, running=round(requests(at))))
        sizes.append(ranks)
        if running is None:
            decision = decide(policy.propose(window), bounds, window[-1], done)
            if not decision.is_hold:
                running = (float(at), decision.target)
    return sizes, done


def turns(done: Sequence[Resize]) -> int:
    """How often growth follows shrinking or the other way round."""
    signs = [resize.after > resize.before for resize in done]
    return sum(a != b for a, b in itertools.pairwise(signs))


@pytest.mark.parametrize("start", [1, 3, 8, 30])
@pytest.mark.parametrize("work", [1, 9, 10, 11, 45, 95, 101, 300])
def test_constant_work_settles_and_stays(start: int, work: int) -> None:
    sizes, done = follow(WORK, lambda _at: work, ranks=start, seconds=900)
    assert turns(done) <= 1, done
    settled = sizes[-1]
    assert sizes[-300:] == [settled] * 300
    assert work / 10 <= settled * 1.15
    assert settled == 1 or work / 10 >= (settled - 1) * 0.85


@pytest.mark.parametrize("seed", range(4))
def test_steady_uneven_work_turns_at_most_once_in_ten_minutes(seed: int) -> None:
    chance = random.Random(seed)
    level = chance.uniform(5, 200)
    policy = TargetWork(requests_per_rank=10)

    def bursty(at: float) -> float:
        return max(0.0, chance.gauss(level, 0.2 * level)) * (3.0 if at % 97 < 8 and chance.random() < 0.9 else 1.0)

    sizes, done = follow(policy, bursty, ranks=chance.randint(1, 20), seconds=1800)
    for begin in range(0, 1200, 60):
        assert turns([resize for resize in done if begin <= resize.at_s < begin + 600]) <= 1, done
    assert sizes[-1] >= level / 10 / 1.2


def test_a_burst_is_met_at_once_and_not_followed_down() -> None:
    sizes, _ = follow(WORK, lambda at: 200 if 100 <= at < 110 else 15, ranks=2, seconds=400, bounds=Bounds(max_ranks=64, growth=100))
    assert max(sizes) == 20
    first = sizes.index(20)
    assert first <= 100 + 6 + 10 + 2, "seen within the panic window, and the time of the resize"
    until = next(at for at in range(first, 400) if sizes[at] < 20)
    assert until >= 110 + 60, "while the burst is in the window nothing shrinks"
    assert sizes[-1] <= 3


def test_growth_is_bounded_a_step() -> None:
    sizes, done = follow(WORK, lambda _at: 400, ranks=1, seconds=200)
    assert [resize.after for resize in done][:5] == [2, 4, 8, 16, 32]
    assert sizes[-1] == 40


def test_a_slow_resize_makes_for_a_long_cool_down() -> None:
    def fall_after_growth(seconds: float) -> float:
        _, done = follow(WORK, lambda at: 100 if at < 200 else 10, ranks=1, seconds=1500, resize_s=seconds)
        last = max(i for i, resize in enumerate(done) if resize.after > resize.before)
        return done[last + 1].at_s - done[last].at_s

    assert fall_after_growth(100.0) >= 500 > fall_after_growth(1.0)


def test_a_full_cache_counts_as_work() -> None:
    full = Observation(at_s=0, ranks=2, running=1, kv_tokens_used=1900, kv_tokens=2000)
    assert WORK.propose([full]).ranks == 3
    assert TargetWork(requests_per_rank=10, kv_share=1.0).propose([full]).ranks == 2
    waiting = Observation(at_s=0, ranks=2, running=1, prefill_tokens_waiting=30_000)
    assert TargetWork(prefill_tokens_per_rank=10_000).propose([waiting]).ranks == 3
    assert TargetWork().propose([waiting]).ranks == 2


def at(text: str) -> Observation:
    return Observation(at_s=0.0, unix_s=datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp(), ranks=1)


@pytest.mark.parametrize(
    ("when", "ranks"),
    [
        ("2026-11-23 07:59", 1),  # a Monday
        ("2026-11-23 08:00", 4),
        ("2026-11-23 12:30", 6),
        ("2026-11-23 19:59", 4),
        ("2026-11-23 20:00", 1),
        ("2026-11-28 12:30", 1),
        ("2026-11-28 23:00", 3),
        ("2026-11-29 01:59", 3),
        ("2026-11-29 23:00", 1),
    ],
)
def test_a_schedule_knows_days_overlaps_and_midnight(when: str, ranks: int) -> None:
    weekdays = (0, 1, 2, 3, 4)
    spans = [
        {"begin": "08:00", "until": "20:00", "ranks": 4, "days": weekdays},
        {"begin": "12:00", "until": "13:00", "ranks": 6, "days": weekdays},
        {"begin": "22:00", "until": "02:00", "ranks": 3, "days": (5,)},
    ]
    assert make_policy("schedule", {"spans": spans}).propose([at(when)]).ranks == ranks


def test_a_schedule_has_a_timezone() -> None:
    policy = make_policy("schedule", {"spans": [{"begin": "08:00", "until": "09:00", "ranks": 2}], "timezone": "Asia/Tokyo"})
    assert policy.propose([at("2026-11-23 23:30")]).ranks == 2
    assert policy.propose([at("2026-11-23 08:30")]).ranks == 1


class Fixed:
    """A policy from outside."""

    window_s = 5.0

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def propose(self, window: Sequence[Observation]) -> Proposal:
        assert window
        return Proposal(self.ranks, "fixed")


def test_the_highest_of_several_wins_and_one_from_outside_is_imported() -> None:
    rows = [{"name": "target-work", "options": {"requests_per_rank": 10}}, {"name": f"{__name__}:Fixed", "options": {"ranks": 3}}]
    policy = make_policy("highest", {"policies": rows})
    assert (policy.window_s, policy.propose([Observation(at_s=0, ranks=1, running=5)])) == (600.0, Proposal(3, "fixed"))
    assert policy.propose([Observation(at_s=0, ranks=3, running=50)]).ranks == 5


def test_bounds_hold_whatever_is_proposed() -> None:
    bounds = Bounds(min_ranks=2, max_ranks=4)
    just_now = [Resize(0.0, 2, 3, 1.0)]

    def decided(ranks: int, wanted: int, done: Sequence[Resize] = ()) -> Decision:
        return decide(Proposal(wanted, "?"), bounds, Observation(at_s=1.0, ranks=ranks), done)

    assert [decided(3, wanted).target for wanted in (0, 1, 2, 4, 100)] == [2, 2, 2, 4, 4]
    assert decided(3, 2, just_now).is_hold
    assert "shrinks in 59 s" in decided(3, 2, just_now).reason
    assert decided(9, 9, just_now).target == 4, "out of bounds is mended at once"
    assert decided(1, 1, just_now).target == 2


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("target", {}, "unknown scaling policy 'target'"),
        ("target-work", {"requests_per_rank": 0}, "requests_per_rank must be above 0"),
        ("target-work", {"requests_per_rnk": 3}, "requests_per_rnk"),
        ("target-work", {"panic_window_s": 90}, "panic_window_s"),
        ("target-work", {"grow_window_s": 900}, "grow_window_s"),
        ("target-work", {"tolerance": 1.0}, "tolerance"),
        ("schedule", {"spans": [{"begin": "25:00", "until": "26:00", "ranks": 1}]}, "25:00"),
        ("schedule", {"spans": [{"begin": "01:00", "until": "02:00", "ranks": 0}]}, "at least one"),
        ("schedule", {"spans": [], "timezone": "Mars/Olympus"}, "Mars/Olympus"),
        ("schedule", {"spans": [{"begin": "01:00", "until": "02:00", "ranks": 1, "days": [7]}]}, "0 .Monday. to 6"),
        ("highest", {"policies": []}, "no policy"),
        ("highest", {}, "highest takes"),
        ("no.such:Policy", {}, "no.such:Policy"),
        (f"{__name__}:Fixed", {}, "cannot be made"),
        ("builtins:dict", {}, "is no scaling policy"),
    ],
)
def test_what_cannot_be_a_policy_is_refused_by_name(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make_policy(name, options)


def test_contradicting_bounds_are_refused() -> None:
    for wrong in ({"min_ranks": 3, "max_ranks": 2}, {"min_ranks": 0}, {"growth": 1.0}, {"cool_down_s": -1.0}):
        with pytest.raises(ConfigurationError):
            Bounds(**wrong)  # type: ignore[arg-type]


def test_policies_are_of_the_protocol() -> None:
    assert isinstance(WORK, ScalingPolicy)
    assert isinstance(Highest([WORK]), ScalingPolicy)
