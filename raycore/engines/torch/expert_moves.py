"""From one placement of experts to another: who sends which expert to whom, in portions of bounded bytes. Pure.

Every rank of the group that carries the bytes works out the same list from the same plan, so nobody has to be told what comes next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from raycore.engines.expert_change import ExpertChange
from raycore.engines.torch.expert_map import EMPTY_SLOT, ExpertMap, LayerMap
from raycore.errors import ConfigurationError


class SwapPlan(msgspec.Struct, frozen=True):
    """A change of placement, over a group of all old and new members (for a change among the same members: their own group).

    `before` and `after` have a row for each rank of that group, empty for one that joins or leaves; `members`: the ranks of that group that
    are the new members, in the order of their own group. `after.shares`, where given, has rows likewise.
    """

    before: ExpertMap
    after: ExpertMap
    members: tuple[int, ...]

    def placed(self) -> ExpertMap:
        """The new placement by the members' own group ranks."""
        return {
            layer: LayerMap(
                tuple(after.rows[rank] for rank in self.members),
                tuple(after.shares[rank] for rank in self.members) if after.shares else (),
            )
            for layer, after in self.after.items()
        }


def plan_of(change: ExpertChange, carriers: Sequence[int], members: Sequence[int]) -> SwapPlan:
    """A change by rank as a plan by group rank. `carriers`: the ranks of the group that carries the bytes, in its order; `members`: of the
    new epoch's, who are among them. ConfigurationError when they are not, or what is given is not by layers and ranks.
    """
    strangers = sorted(set(members) - set(carriers))
    if strangers:
        raise ConfigurationError(f"rank {strangers[0]} would be a member, and the group that carries the experts does not reach it")
    sides = [
        {
            _number(layer): LayerMap(
                tuple(rows.get(rank, ()) for rank in carriers),
                tuple(shares[layer].get(rank, ()) for rank in carriers) if layer in shares else (),
            )
            for layer, rows in side.items()
        }
        for side, shares in ((change.before, {}), (change.after, change.shares))
    ]
    return SwapPlan(sides[0], sides[1], tuple(carriers.index(rank) for rank in members))


def _number(layer: str) -> int:
    if not layer.isdigit():
        raise ConfigurationError(f"{layer!r} is no layer with experts")
    return int(layer)


class Transfer(NamedTuple):
    """One expert's weights, from one rank of the carrying group to another."""

    layer: int
    expert: int
    source: int
    target: int


def transfers(plan: SwapPlan, expert_bytes: Mapping[int, int]) -> list[Transfer]:
    """What has to be carried, layer by layer; `expert_bytes`: of one expert of a layer.

    An expert with several holders is sent by the one that has sent least so far. ConfigurationError when nobody holds one.
    """
    found: list[Transfer] = []
    sent: dict[int, int] = {}
    for layer in sorted(plan.after):
        before, after = plan.before[layer], plan.after[layer]
        holders: dict[int, list[int]] = {}
        for rank, row in enumerate(before.rows):
            for expert in row:
                holders.setdefault(expert, []).append(rank)
        for target, row in enumerate(after.rows):
            for expert in row:
                if expert == EMPTY_SLOT or target in holders.get(expert, ()):
                    continue
                if expert not in holders:
                    raise ConfigurationError(f"expert {expert} of layer {layer} is on no rank that could send it")
                source = min(holders[expert], key=lambda rank: (sent.get(rank, 0), rank))
                sent[source] = sent.get(source, 0) + expert_bytes[layer]
                found.append(Transfer(layer, expert, source, target))
    return found


def portions(carried: Sequence[Transfer], expert_bytes: Mapping[int, int], budget_bytes: int) -> Iterator[list[Transfer]]:
    """In order, as many at a time as no rank has to send or receive more than the budget for; always at least one. Layers are not mixed."""
    portion: list[Transfer] = []
    busy: dict[tuple[str, int], int] = {}
    for transfer in carried:
        size = expert_bytes[transfer.layer]
        ends = (("from", transfer.source), ("to", transfer.target))
        is_full = any(busy.get(end, 0) + size > budget_bytes for end in ends)
        if portion and (is_full or portion[0].layer != transfer.layer):
            yield portion
            portion, busy = [], {}
        portion.append(transfer)
        for end in ends:
            busy[end] = busy.get(end, 0) + size
    if portion:
        yield portion
