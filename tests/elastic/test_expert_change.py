"""Experts of a pool that grows or shrinks: by rank, everything covered, little moved."""

from __future__ import annotations

import pytest

from elastic.expert_change import plan_change
from raycore.engines.expert_change import ExpertChange


def covered(change: ExpertChange, layer: str) -> set[int]:
    return {expert for row in change.after[layer].values() for expert in row if expert >= 0}


def received(change: ExpertChange, layer: str) -> int:
    before = change.before[layer]
    return sum(len({expert for expert in row if expert >= 0} - set(before.get(rank, ()))) for rank, row in change.after[layer].items())


def test_a_rank_that_joins_takes_its_share_and_nobody_else_receives_anything() -> None:
    change = plan_change({"0": [[0, 1, 2], [3, 4, 5]]}, {"0": [1.0] * 6}, (0, 3), (0, 3, 4))
    assert change.before == {"0": {0: (0, 1, 2), 3: (3, 4, 5)}}
    assert set(change.after["0"]) == {0, 3, 4}
    assert {len(row) for row in change.after["0"].values()} == {2}
    assert covered(change, "0") == set(range(6))
    assert received(change, "0") == 2


def test_what_a_leaving_rank_holds_goes_to_those_that_stay() -> None:
    change = plan_change({"0": [[0, 1], [2, 3], [4, 5]]}, {"0": [1.0] * 6}, (0, 1, 2), (1, 2))
    assert set(change.after["0"]) == {1, 2}
    assert covered(change, "0") == set(range(6))
    assert received(change, "0") == 2


def test_spare_slots_stay_in_the_pool() -> None:
    change = plan_change({"0": [[0, 1, 2], [3, 0, 1]]}, {"0": [5.0, 1.0, 1.0, 1.0]}, (0, 1), (0, 1, 2))
    assert sum(len(row) for row in change.after["0"].values()) == 6
    for rank, row in change.after["0"].items():
        assert len(change.shares["0"][rank]) == len(row)


def test_a_pool_that_grows_and_shrinks_gathers_no_spare_slots() -> None:
    rows, ranks = [[0, 1], [2, 3]], (0, 1)
    held = []
    for after in ((0, 1, 2), (1, 2), (2,), (0, 2), (0, 1, 2, 3), (0, 3)):
        change = plan_change({"0": rows}, {"0": [1.0] * 4}, ranks, after)
        assert covered(change, "0") == set(range(4))
        rows, ranks = [list(change.after["0"][rank]) for rank in after], after
        held.append([len(row) for row in rows])
    assert held == [[2, 2, 2], [2, 2], [4], [2, 2], [1, 1, 1, 1], [2, 2]]


def test_a_rank_has_no_more_slots_than_there_are_experts() -> None:
    change = plan_change({"0": [[0, 1, 2], [2, 0, 1], [1, 2, 0]]}, {"0": [1.0] * 3}, (0, 1, 2), (1,))
    assert sorted(change.after["0"][1]) == [0, 1, 2]


def test_all_ranks_may_be_replaced() -> None:
    change = plan_change({"0": [[0, 1], [2, 3]]}, {"0": [1.0] * 4}, (0, 1), (2, 3))
    assert covered(change, "0") == set(range(4))
    assert received(change, "0") == 4


def test_rows_of_another_number_of_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        plan_change({"0": [[0], [1]]}, {"0": [1.0, 1.0]}, (0,), (0, 1))
