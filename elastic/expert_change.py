"""The experts of a pool that grows or shrinks: few moves, everything covered, no more spare slots in all than there were. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elastic.experts import plan_experts
from raycore.engines.expert_change import ExpertChange


def plan_change(
    placement: Mapping[str, Sequence[Sequence[int]]], loads: Mapping[str, Sequence[float]], before: Sequence[int], after: Sequence[int]
) -> ExpertChange:
    """From the ranks `before`, whose rows `placement` has in their order, to the ranks `after`.

    `placement` and `loads` are what the ranks say of themselves (`expert_placement`; `expert_load`, added up). ValueError when a layer's
    placement is of another number of ranks.
    """
    change = ExpertChange({}, {}, {})
    for layer, rows in placement.items():
        experts = len(loads[layer])
        residents = {rank: tuple(row) for rank, row in zip(before, rows, strict=True)}
        slots = slots_of(experts, sum(len(row) for row in rows), len(before), len(after))
        plan = plan_experts(loads[layer], residents, after, slots)
        change.before[layer] = residents
        change.after[layer] = plan.placement
        change.shares[layer] = plan.shares
    return change


def slots_of(experts: int, total: int, before: int, after: int) -> int:
    """How many slots each of `after` ranks has, where `before` ranks have `total` together.

    Fewer spare ones than ranks are what rounding left, and are not carried on: a pool that grows and shrinks would gather them.
    """
    each_once = -(-experts // after)
    if total - experts < before:
        return each_once
    return min(experts, max(each_once, total // after))
