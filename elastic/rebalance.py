"""Rebalancing experts among the ranks of a running pool: what was counted in, a better placement out, and the asking of the ranks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from elastic.experts import ExpertPlan, plan_experts
from raycore.errors import DeadlineError, NoEngineError

DEFAULT_IMBALANCE = 1.1
"""Load of the busiest rank over the mean up to which a layer is left alone: below it, moving costs more than it gives."""
DEFAULT_BYTES_PER_STEP = 16 << 20
_POLL_S = 0.05

Rows = Sequence[Sequence[int]]
"""A layer's experts by group rank and slot."""


class LayerChange(msgspec.Struct, frozen=True):
    """One layer's way to its new placement. `before` and `after`: load of the busiest rank over the mean, under what was counted."""

    layer: str
    plan: ExpertPlan
    before: float
    after: float

    @property
    def moves(self) -> int:
        """Experts that have to be received."""
        return len(self.plan.moves)


class RebalanceReport(msgspec.Struct, frozen=True):
    """What was asked of the ranks; `number` 0: nothing had to be. The imbalances are those of the worst layer."""

    number: int
    layers: int
    moves: int
    before: float
    after: float


class ExpertRanks(Protocol):
    """A client of an expert-parallel pool, as far as this needs it."""

    async def call_all(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> dict[int, Any]:
        """Each rank's result, or its error as the value."""
        ...


def plan_rebalance(
    loads: Mapping[str, Sequence[float]], placement: Mapping[str, Rows], *, max_imbalance: float = DEFAULT_IMBALANCE
) -> list[LayerChange]:
    """The layers that are worse than `max_imbalance` and can be made better, by how much, and how.

    `loads`: by layer, the tokens of each expert over all ranks. `placement`: by layer, the experts of each group rank by slot, -1 for an
    empty one. Where tokens can be shared out among copies better than evenly, that comes first, since it costs no bytes.
    """
    changes: list[LayerChange] = []
    for layer, rows in placement.items():
        before = imbalance(loads[layer], rows)
        if before <= max_imbalance:
            continue
        residents = {rank: tuple(row) for rank, row in enumerate(rows)}
        plan = plan_experts(loads[layer], residents, residents, max(len(row) for row in rows), max_imbalance=max_imbalance)
        if plan.imbalance < before:
            changes.append(LayerChange(layer, plan, before, plan.imbalance))
    return changes


def imbalance(loads: Sequence[float], rows: Rows) -> float:
    """Load of the busiest rank over the mean where the copies of an expert share its tokens evenly; 1 without any load."""
    copies = Counter(expert for row in rows for expert in row)
    busy = [sum(loads[expert] / copies[expert] for expert in row if expert >= 0) for row in rows]
    mean = sum(busy) / len(busy)
    return max(busy) / mean if mean else 1.0


async def rebalance(
    client: ExpertRanks,
    *,
    max_imbalance: float = DEFAULT_IMBALANCE,
    bytes_per_step: int = DEFAULT_BYTES_PER_STEP,
    wait_s: float | None = None,
) -> RebalanceReport:
    """Ask the ranks for a placement that fits what they have counted since the last time; returns when they know of it.

    `wait_s`: returns when the experts have moved, DeadlineError when that takes longer; they go on moving. The first error of a rank is
    raised, such as that a change is under way.
    """
    counted = await _of_all(client, "expert_load", reset=True)
    placement: Mapping[str, Rows] = (await _of_all(client, "expert_placement"))[0]
    loads = {layer: [sum(parts) for parts in zip(*(rank[layer] for rank in counted), strict=True)] for layer in placement}
    changes = plan_rebalance(loads, placement, max_imbalance=max_imbalance)
    if not changes:
        return RebalanceReport(0, 0, 0, 0.0, 0.0)
    wanted: dict[str, Rows] = dict(placement)
    shares: dict[str, Sequence[Sequence[float]]] = {}
    for change in changes:
        ranks = sorted(change.plan.placement)
        wanted[change.layer] = [list(change.plan.placement[rank]) for rank in ranks]
        shares[change.layer] = [list(change.plan.shares[rank]) for rank in ranks]
    numbers = await _of_all(client, "rebalance_experts", placement=wanted, shares=shares, bytes_per_step=bytes_per_step)
    if wait_s is not None:
        await _until_moved(client, wait_s)
    return RebalanceReport(
        numbers[0],
        len(changes),
        sum(change.moves for change in changes),
        max(change.before for change in changes),
        max(change.after for change in changes),
    )


async def _until_moved(client: ExpertRanks, wait_s: float) -> None:
    until_s = time.monotonic() + wait_s
    while any(traffic["is_rebalancing"] for traffic in await _of_all(client, "expert_traffic")):
        if time.monotonic() > until_s:
            raise DeadlineError(f"the experts have not all moved after {wait_s:g} s; they go on")
        await asyncio.sleep(_POLL_S)


async def _of_all(client: ExpertRanks, method: str, **arguments: Any) -> list[Any]:
    """Every rank's answer, in the order of ranks."""
    answers = await client.call_all("collective_rpc", method=method, kwargs=arguments)
    if not answers:
        raise NoEngineError(f"no rank answered {method}")
    found = [answers[rank] for rank in sorted(answers)]
    for answer in found:
        if isinstance(answer, BaseException):
            raise answer
    return found
