"""From counted tokens to a better placement, asked of every rank."""

from __future__ import annotations

import random
from typing import Any

import pytest

from elastic.rebalance import imbalance, plan_rebalance, rebalance
from raycore.errors import DeadlineError, EngineStateError, NoEngineError

ROWS = [[0, 1], [2, 3]]


def test_the_imbalance_is_that_of_the_busiest_rank_and_copies_share() -> None:
    assert imbalance([1, 1, 1, 1], ROWS) == 1.0
    assert imbalance([3, 3, 1, 1], ROWS) == 1.5
    assert imbalance([4, 0, 0, 0], [[0, 1], [0, 2, 3]]) == 1.0
    assert imbalance([0, 0, 0, 0], ROWS) == 1.0


def test_a_layer_that_is_even_enough_is_left_alone() -> None:
    assert plan_rebalance({"0": [5, 5, 5, 5], "1": [6, 5, 5, 5]}, {"0": ROWS, "1": ROWS}) == []


def test_an_uneven_layer_gets_a_placement_that_exchanges_little() -> None:
    (change,) = plan_rebalance({"0": [9, 9, 1, 1], "1": [5, 5, 5, 5]}, {"0": ROWS, "1": ROWS})
    assert change.layer == "0"
    assert change.before == 1.8
    assert change.after == 1.0
    assert change.moves == 2, "one expert each way"
    assert {expert for row in change.plan.placement.values() for expert in row} == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_is_never_worse_than_what_is(seed: int) -> None:
    rng = random.Random(seed)
    loads = [1 / (place + 1) for place in range(16)]
    rng.shuffle(loads)
    rows = [list(range(rank * 4, rank * 4 + 4)) + rng.sample([e for e in range(16) if e // 4 != rank], 2) for rank in range(4)]
    for change in plan_rebalance({"0": loads}, {"0": rows}):
        assert change.after < change.before


class Ranks:
    """Two ranks that remember what they were asked."""

    def __init__(self, load: list[list[int]], failure: Exception | None = None, steps: int = 0) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._steps = steps
        self._load, self._failure = load, failure

    async def call_all(self, name: str, /, *, timeout_s: float | None = None, **arguments: Any) -> dict[int, Any]:
        assert (name, timeout_s) == ("collective_rpc", None)
        method, keywords = arguments["method"], arguments["kwargs"]
        self.asked.append((method, keywords))
        answers = {"expert_load": [{"3": row} for row in self._load], "expert_placement": [{"3": ROWS}] * 2, "rebalance_experts": [7, 7]}
        if method == "expert_traffic":
            self._steps -= 1
            answers[method] = [{"is_rebalancing": int(self._steps > 0)}, {"is_rebalancing": 0}]
        found: list[Any] = answers[method]
        if method == "rebalance_experts" and self._failure is not None:
            found = [7, self._failure]
        return {7: found[1], 2: found[0]}


async def test_the_ranks_loads_are_added_up_and_all_are_asked_for_the_same() -> None:
    ranks = Ranks([[9, 1, 0, 0], [0, 8, 1, 1]])
    report = await rebalance(ranks, bytes_per_step=123)
    assert (report.number, report.layers, report.moves, report.before, report.after) == (7, 1, 2, 1.8, 1.0)
    assert [method for method, _ in ranks.asked] == ["expert_load", "expert_placement", "rebalance_experts"]
    assert ranks.asked[0][1] == {"reset": True}, "the next time counts from here"
    wanted = ranks.asked[2][1]
    assert wanted["bytes_per_step"] == 123
    assert imbalance([9, 9, 1, 1], wanted["placement"]["3"]) == 1.0
    assert [len(row) for row in wanted["shares"]["3"]] == [2, 2]


async def test_who_wants_to_waits_until_the_experts_have_moved() -> None:
    ranks = Ranks([[9, 1, 0, 0], [0, 8, 1, 1]], steps=3)
    await rebalance(ranks, wait_s=60)
    assert [method for method, _ in ranks.asked][3:] == ["expert_traffic"] * 3
    with pytest.raises(DeadlineError, match="go on"):
        await rebalance(Ranks([[9, 1, 0, 0], [0, 8, 1, 1]], steps=1000), wait_s=0.01)


async def test_nothing_is_asked_of_even_ranks_and_the_first_error_is_raised() -> None:
    even = Ranks([[5, 5, 5, 5], [1, 1, 1, 1]])
    assert (await rebalance(even)).number == 0
    assert [method for method, _ in even.asked] == ["expert_load", "expert_placement"]
    with pytest.raises(EngineStateError, match="under way"):
        await rebalance(Ranks([[9, 9, 0, 0], [0, 0, 1, 1]], EngineStateError("a change is under way")))


async def test_a_pool_without_ranks_has_nothing_to_rebalance() -> None:
    class Nobody(Ranks):
        async def call_all(self, name: str, /, *, timeout_s: float | None = None, **arguments: Any) -> dict[int, Any]:
            return {}

    with pytest.raises(NoEngineError):
        await rebalance(Nobody([]))
