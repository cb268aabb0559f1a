"""Placement: every plan fits, every shortage says what is missing, and no feasible demand is refused."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from elastic.placement import (
    UNPLANNED,
    NodeSnapshot,
    NodeStrategy,
    PlacementPlan,
    RankDemand,
    Shortage,
    matches,
    plan_partly,
    plan_placement,
)

CPU = RankDemand(bundles=({"CPU": 1.0},))
STRATEGIES: tuple[NodeStrategy, ...] = ("pack", "spread", "strict")


def node(name: str, free: float, total: float | None = None, **changes: object) -> NodeSnapshot:
    facts: dict[str, object] = {"total": {"CPU": free if total is None else total}, "available": {"CPU": free}, **changes}
    return NodeSnapshot(node_id=name, ip=f"10.0.0.{ord(name[0]) - 96}", **facts)  # type: ignore[arg-type]


def planned(*nodes: NodeSnapshot, count: int, strategy: NodeStrategy = "pack", demand: RankDemand = CPU) -> list[str]:
    plan = plan_placement(nodes, demand, count, strategy)
    assert isinstance(plan, PlacementPlan), plan
    return list(plan.nodes)


def refused(*nodes: NodeSnapshot, count: int, strategy: NodeStrategy = "pack", demand: RankDemand = CPU) -> Shortage:
    plan = plan_placement(nodes, demand, count, strategy)
    assert isinstance(plan, Shortage), plan
    return plan


def test_pack_fills_nodes_in_order() -> None:
    assert planned(node("a", 2), node("b", 4), count=5) == ["a", "a", "b", "b", "b"]


def test_spread_levels_nodes_and_keeps_a_nodes_ranks_together() -> None:
    assert planned(node("a", 4), node("b", 1), node("c", 4), count=5, strategy="spread") == ["a", "a", "b", "c", "c"]


def test_strict_puts_the_same_number_on_as_few_nodes_as_can_be() -> None:
    assert planned(node("a", 3), node("b", 2), node("c", 2), count=4, strategy="strict") == ["a", "a", "b", "b"]
    assert refused(node("a", 3), node("b", 2), count=5, strategy="strict").is_infeasible


@pytest.mark.parametrize("strategy", ["pack", "spread"])
def test_ranks_without_room_wait_for_nodes_that_are_to_come(strategy: NodeStrategy) -> None:
    nodes = (node("a", 2), node("b", 1, total=4), node("c", 8, is_draining=True))
    assert plan_partly(nodes, CPU, 5, strategy).nodes == ("a", "a", "b", UNPLANNED, UNPLANNED)
    assert plan_partly(nodes, CPU, 3, strategy).nodes == ("a", "a", "b")
    assert plan_partly((), CPU, 1, strategy).nodes == (UNPLANNED,)


def test_a_busy_cluster_is_told_from_one_that_is_too_small() -> None:
    busy = refused(node("a", 1, total=4), count=3)
    assert not busy.is_infeasible
    assert "other work holds the resources" in busy.text
    assert "room for 1 now, 4 when idle, short of CPU (CPU 1 free of 4)" in busy.text
    small = refused(node("a", 4), count=5)
    assert small.is_infeasible
    assert "5 ranks of CPU 1 each (pack) do not fit this cluster, even if it were idle" in small.text


def test_the_scarce_resource_is_named() -> None:
    demand = RankDemand(bundles=({"CPU": 1.0, "GPU": 1.0},))
    shortage = refused(NodeSnapshot("a", "10.0.0.1", {"CPU": 64.0}, {"CPU": 64.0}), count=1, demand=demand)
    assert "short of GPU (CPU 64 free of 64; GPU 0 free of 0)" in shortage.text


def test_dead_nodes_hold_nothing() -> None:
    shortage = refused(node("a", 4, alive=False), count=1)
    assert shortage.is_infeasible
    assert "node 10.0.0.1 (a): dead" in shortage.text


def test_an_empty_cluster_says_so() -> None:
    assert "the cluster has no nodes" in refused(count=1).text


def test_labels_choose_nodes_and_a_mismatch_is_explained() -> None:
    h100 = RankDemand(bundles=({"CPU": 1.0},), label_selector={"gpu": "H100"})
    nodes = (node("a", 4, labels={"gpu": "T4"}), node("b", 4, labels={"gpu": "H100"}))
    assert planned(*nodes, count=2, demand=h100) == ["b", "b"]
    text = refused(nodes[0], count=2, demand=h100).text
    assert "labels do not match: gpu=T4 (wanted H100)" in text
    assert "no node that lives has the labels {'gpu': 'H100'}" in text


@pytest.mark.parametrize(
    ("wanted", "actual", "expected"),
    [
        ("x", "x", True),
        ("x", "y", False),
        ("x", None, False),
        ("!x", "y", True),
        ("!x", "x", False),
        ("!x", None, True),
        ("in(x, y)", "y", True),
        ("in(x,y)", "z", False),
        ("in(x)", None, False),
        ("!in(x,y)", "z", True),
        ("!in(x,y)", "x", False),
        ("!in(x)", None, True),
    ],
)
def test_selectors_follow_rays_grammar(wanted: str, actual: str | None, *, expected: bool) -> None:
    labels = {} if actual is None else {"key": actual}
    assert matches(labels, {"key": wanted}) is expected


def test_a_rank_that_needs_nothing_fits_anywhere() -> None:
    assert planned(node("a", 0), count=1000, demand=RankDemand(bundles=({"CPU": 0.0},))) == ["a"] * 1000


def test_bundles_of_one_rank_are_summed() -> None:
    demand = RankDemand(bundles=({"GPU": 1.0}, {"GPU": 1.0}))
    assert demand.total() == {"GPU": 2.0}
    gpus = NodeSnapshot("a", "10.0.0.1", {"GPU": 8.0}, {"GPU": 5.0})
    assert planned(gpus, count=2, demand=demand) == ["a", "a"]
    assert not refused(gpus, count=3, demand=demand).is_infeasible


def test_thousandths_of_a_resource_do_not_get_lost() -> None:
    third = RankDemand(bundles=({"CPU": 0.1},))
    assert len(planned(node("a", 0.3), count=3, demand=third)) == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(60))
def test_plans_fit_and_refusals_are_true(seed: int, strategy: NodeStrategy) -> None:
    chance = random.Random(seed)
    totals = [chance.randint(0, 5) for _ in range(chance.randint(1, 4))]
    nodes = [node("abcd"[i], chance.randint(0, total), total=total) for i, total in enumerate(totals)]
    count = chance.randint(1, 8)
    plan = plan_placement(nodes, CPU, count, strategy)
    free = {n.node_id: int(n.available["CPU"]) for n in nodes}
    if isinstance(plan, PlacementPlan):
        assert len(plan.nodes) == count
        _check_plan(Counter(plan.nodes), free, strategy)
    else:
        assert not _exists(list(free.values()), count, strategy), f"seed {seed}: {plan.text}"
        assert plan.is_infeasible == (not _exists(totals, count, strategy))


def _check_plan(given: Counter[str], free: dict[str, int], strategy: NodeStrategy) -> None:
    assert all(given[name] <= free[name] for name in given)
    if strategy == "strict":
        assert len(set(given.values())) == 1
    if strategy == "spread":
        lowest_with_room = min((given[name] for name in free if given[name] < free[name]), default=10**6)
        assert max(given.values()) <= lowest_with_room + 1


def _exists(rooms: list[int], count: int, strategy: NodeStrategy) -> bool:
    for shares in itertools.product(*(range(room + 1) for room in rooms)):
        used = {share for share in shares if share}
        if sum(shares) == count and (strategy != "strict" or len(used) == 1):
            return True
    return False
