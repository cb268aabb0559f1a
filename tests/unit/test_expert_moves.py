"""Who sends which expert to whom, and how much at a time: pure."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from raycore.engines.expert_change import ExpertChange
from raycore.engines.torch.expert_map import LayerMap, fingerprint
from raycore.engines.torch.expert_moves import SwapPlan, Transfer, portions, transfers
from raycore.engines.torch.expert_moves import plan_of as by_group_rank
from raycore.errors import ConfigurationError


def plan_of(before: list[list[int]], after: list[list[int]], members: tuple[int, ...] | None = None) -> SwapPlan:
    rows = [LayerMap(tuple(map(tuple, side))) for side in (before, after)]
    return SwapPlan({0: rows[0]}, {0: rows[1]}, members or tuple(range(len(after))))


def test_only_what_a_rank_lacks_is_sent() -> None:
    plan = plan_of([[0, 1], [2, 3], []], [[0, 1], [2], [3]])
    assert transfers(plan, {0: 10}) == [Transfer(0, 3, 1, 2)]


def test_several_holders_share_the_sending() -> None:
    everything = list(range(8))
    plan = plan_of([everything, everything, [], []], [[0, 1], [2, 3], [4, 5], [6, 7]])
    assert Counter(transfer.source for transfer in transfers(plan, {0: 10})) == {0: 2, 1: 2}


def test_an_expert_that_nobody_holds_cannot_be_sent() -> None:
    with pytest.raises(ConfigurationError, match="expert 3 of layer 0 is on no rank"):
        transfers(plan_of([[0, 1], [2]], [[0, 1], [2, 3]]), {0: 10})


def test_a_plans_placement_is_by_the_members_own_ranks() -> None:
    plan = plan_of([[0], [1], [2, 3]], [[], [1, 0], [2, 3]], members=(1, 2))
    assert plan.placed()[0].rows == ((1, 0), (2, 3))


def test_a_change_by_rank_is_a_plan_by_group_rank() -> None:
    change = ExpertChange({"4": {2: (0, 1), 5: (2, 3)}}, {"4": {5: (2, 1), 9: (3, 0)}}, {"4": {5: (1.0, 1.0), 9: (1.0, 1.0)}})
    plan = by_group_rank(change, (2, 5, 9), (5, 9))
    assert plan.before[4].rows == ((0, 1), (2, 3), ())
    assert plan.after[4].rows == ((), (2, 1), (3, 0))
    assert plan.after[4].shares == ((), (1.0, 1.0), (1.0, 1.0))
    assert plan.members == (1, 2)
    assert plan.placed()[4].rows == ((2, 1), (3, 0))
    with pytest.raises(ConfigurationError, match="rank 9 would be a member"):
        by_group_rank(change, (2, 5), (5, 9))
    with pytest.raises(ConfigurationError, match="'x' is no layer"):
        by_group_rank(ExpertChange({"x": {}}, {}), (2,), (2,))


def test_empty_slots_and_order_of_slots_tell_placements_apart() -> None:
    found = {fingerprint({0: LayerMap(rows)}) for rows in (((0, 1),), ((1, 0),), ((0, 1, -1),), ((0,), (1,)))}
    assert len(found) == 4
    assert all(0 <= number < 2**62 for number in found)


@pytest.mark.parametrize("seed", range(20))
def test_portions_are_in_order_within_the_budget_and_complete(seed: int) -> None:
    rng = random.Random(seed)
    ranks, experts, layers = rng.randrange(2, 6), rng.randrange(2, 20), rng.randrange(1, 4)
    size = {layer: rng.randrange(5, 50) for layer in range(layers)}
    holder = {layer: [rng.randrange(ranks) for _ in range(experts)] for layer in range(layers)}
    before = {layer: LayerMap(tuple(tuple(e for e in range(experts) if holder[layer][e] == r) for r in range(ranks))) for layer in size}
    after = {
        layer: LayerMap(tuple(tuple(rng.sample(range(experts), rng.randrange(experts))) for _ in range(ranks))) for layer in range(layers)
    }
    carried = transfers(SwapPlan(before, after, tuple(range(ranks))), size)
    budget = rng.randrange(20, 200)
    found = list(portions(carried, size, budget))
    assert [transfer for portion in found for transfer in portion] == carried
    for portion in found:
        assert len({transfer.layer for transfer in portion}) == 1
        for end in ("source", "target"):
            busiest = Counter(getattr(transfer, end) for transfer in portion).most_common(1)[0][1]
            assert busiest * size[portion[0].layer] <= budget or len(portion) == 1
