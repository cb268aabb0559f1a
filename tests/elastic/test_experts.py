"""Where experts go: everything covered, residents kept, few slots received, ranks evenly loaded. Over seeded Zipf loads."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from elastic.experts import EMPTY_SLOT, ExpertPlan, ImpossiblePlanError, Placement, forced_slots, plan_experts

RESIZES = [(4, 5), (4, 8), (6, 4), (8, 12), (12, 8), (16, 20), (20, 16)]


def zipf(experts: int, exponent: float, generator: random.Random) -> list[float]:
    loads = [1 / (place + 1) ** exponent for place in range(experts)]
    generator.shuffle(loads)
    return loads


def drifted(loads: list[float], generator: random.Random) -> list[float]:
    return [load * generator.uniform(0.8, 1.25) for load in loads]


def slots_for(experts: int, ranks: int) -> int:
    """A quarter more than the experts need on the smaller fleet."""
    return -(-experts // ranks) + max(2, experts // ranks // 4)


def check(plan: ExpertPlan, loads: list[float], residents: Placement, ranks: range, slots: int) -> None:
    """What every plan must hold to, recomputed from its placement and shares."""
    assert set(plan.placement) == set(ranks)
    assert {expert for row in plan.placement.values() for expert in row} - {EMPTY_SLOT} == set(range(len(loads))), "everything is covered"
    parts: Counter[int] = Counter()
    busy: Counter[int] = Counter()
    for rank, row in plan.placement.items():
        assert len(row) == len(plan.shares[rank]) == slots
        experts = [expert for expert in row if expert != EMPTY_SLOT]
        assert len(experts) == len(set(experts)), "one copy of an expert on a rank"
        for expert, share in zip(row, plan.shares[rank], strict=True):
            assert -1e-9 <= share <= 1 + 1e-9
            if expert != EMPTY_SLOT:
                parts[expert] += share  # type: ignore[assignment]
                busy[rank] += share * loads[expert]  # type: ignore[assignment]
        for slot, expert in enumerate(residents.get(rank, ())):
            if expert in row:
                assert row[slot] == expert, "what stays on its rank stays in its slot"
    assert all(part == pytest.approx(1.0) for part in parts.values())
    assert max(busy.values()) / (sum(loads) / len(ranks)) == pytest.approx(plan.imbalance, rel=1e-6)
    received = {
        (rank, slot)
        for rank, row in plan.placement.items()
        for slot, e in enumerate(row)
        if e not in {EMPTY_SLOT, *residents.get(rank, ())}
    }
    assert {(move.rank, move.slot) for move in plan.moves} == received
    for move in plan.moves:
        assert plan.placement[move.rank][move.slot] == move.expert
        assert set(move.sources) == {rank for rank, row in residents.items() if move.expert in row}


@pytest.mark.parametrize("exponent", [0.6, 1.0])
@pytest.mark.parametrize("experts", [64, 128])
@pytest.mark.parametrize(("before", "after"), RESIZES)
def test_a_resize_moves_little_and_ends_balanced(before: int, after: int, experts: int, exponent: float) -> None:
    generator = random.Random(f"{before} {after} {experts} {exponent}")
    slots = slots_for(experts, min(before, after))
    loads = zipf(experts, exponent, generator)
    old = plan_experts(loads, {}, range(before), slots)
    check(old, loads, {}, range(before), slots)
    loads = drifted(loads, generator)
    forced = forced_slots(experts, old.placement, range(after), slots)
    for max_imbalance, most in ((1.05, 1.5), (1.2, 1.3)):
        plan = plan_experts(loads, old.placement, range(after), slots, max_imbalance=max_imbalance)
        check(plan, loads, old.placement, range(after), slots)
        assert plan.imbalance <= max_imbalance
        assert forced <= len(plan.moves) <= most * forced


def test_several_resizes_one_after_the_other_keep_everything_covered() -> None:
    generator = random.Random(3)
    experts, slots = 64, 20
    loads = zipf(experts, 0.8, generator)
    residents: Placement = {}
    for ranks in (range(4), range(8), range(2, 7), range(1, 8), range(5), range(3, 8)):
        plan = plan_experts(loads, residents, ranks, slots)
        check(plan, loads, residents, ranks, slots)
        residents, loads = plan.placement, drifted(loads, generator)


def test_a_plan_that_fits_moves_nothing() -> None:
    loads = zipf(64, 1.0, random.Random(5))
    old = plan_experts(loads, {}, range(6), 16)
    assert plan_experts(loads, old.placement, range(6), 16).moves == ()


def test_shares_alone_follow_a_small_drift() -> None:
    generator = random.Random(6)
    loads = zipf(64, 0.6, generator)
    old = plan_experts(loads, {}, range(6), 16)
    assert plan_experts(drifted(loads, generator), old.placement, range(6), 16, max_imbalance=1.1).moves == ()


def test_ranks_that_hold_every_expert_leave_their_other_slots_empty() -> None:
    plan = plan_experts([3.0, 1.0], {}, [4, 9], 4)
    assert [sorted(row) for row in plan.placement.values()] == [[EMPTY_SLOT, EMPTY_SLOT, 0, 1]] * 2
    assert plan.imbalance == pytest.approx(1.0)


def test_experts_without_any_load_are_covered_too() -> None:
    check(plan_experts([0.0] * 10, {}, range(3), 4), [1.0] * 10, {}, range(3), 4)
    plan = plan_experts([1.0] + [0.0] * 9, {}, range(3), 4)
    assert {expert for row in plan.placement.values() for expert in row} == set(range(10))


def test_a_lost_expert_has_no_source() -> None:
    plan = plan_experts([1.0, 1.0], {0: (0,)}, [0, 1], 1)
    assert [(move.expert, move.rank, move.sources) for move in plan.moves] == [(1, 1, ())]


@pytest.mark.parametrize(("loads", "error"), [([1.0] * 9, ImpossiblePlanError), ([1.0, -1.0], ValueError)])
def test_what_cannot_be_planned_is_refused(loads: list[float], error: type[Exception]) -> None:
    with pytest.raises(error):
        plan_experts(loads, {}, range(2), 4)
