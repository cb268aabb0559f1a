"""Which rank holds which experts of a layer: plans that keep what is resident, cover everything, and move few bytes. Pure.

A rank has the same number of physical slots as every other; an expert may have copies on several ranks, at most one on each. A token for an
expert goes to one of its copies, by shares that the plan fixes: shares cost no bytes to change, so they are used up before anything moves.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, final

import msgspec

Placement = dict[int, tuple[int, ...]]
"""Rank to the experts in its slots, by slot."""

EMPTY_SLOT = -1
_SWEEPS = 200
_CLOSE_ENOUGH = 1e-3


class ExpertMove(NamedTuple):
    """One expert's weights to receive: by which rank, into which slot, from which ranks that hold it; none has it: from the checkpoint."""

    expert: int
    rank: int
    slot: int
    sources: tuple[int, ...]


class ExpertPlan(msgspec.Struct, frozen=True):
    """Where a layer's experts will be, how their tokens are shared out, and what must be received for that.

    `shares[rank][slot]`: which part of the expert's tokens this copy takes, 0..1; the shares of an expert's copies add up to 1.
    `imbalance`: load of the busiest rank over the mean, under the given loads.
    """

    placement: Placement
    shares: dict[int, tuple[float, ...]]
    moves: tuple[ExpertMove, ...]
    imbalance: float


class ImpossiblePlanError(ValueError):
    """The slots of all ranks together are fewer than the experts."""


def plan_experts(
    loads: Sequence[float], residents: Mapping[int, Sequence[int]], ranks: Iterable[int], slots: int, *, max_imbalance: float = 1.05
) -> ExpertPlan:
    """Place `len(loads)` experts on `ranks` with `slots` slots each.

    `loads`: tokens that each expert gets, any unit; all zero counts as even. `residents`: what ranks hold now, by slot; ranks that are not
    in `ranks` are leaving and are sources only. Copies are moved until `max_imbalance` is reached or no move makes it better.
    Raises ImpossiblePlanError when there are fewer slots than experts.
    """
    wanted = sorted(set(ranks))
    if len(wanted) * slots < len(loads):
        msg = f"{len(wanted)} ranks with {slots} slots each cannot hold {len(loads)} experts"
        raise ImpossiblePlanError(msg)
    draft = _Draft(_normalised(loads), residents, wanted, slots)
    draft.cover()
    draft.fill()
    draft.balance(max_imbalance)
    return draft.plan(residents)


def forced_slots(experts: int, residents: Mapping[int, Sequence[int]], ranks: Iterable[int], slots: int) -> int:
    """Slots that any plan must receive: those of ranks that hold nothing yet, and experts that only leaving ranks hold."""
    wanted = set(ranks)
    empty = sum(slots - sum(expert >= 0 for expert in residents.get(rank, ())) for rank in wanted)
    held = {expert for rank in wanted for expert in residents.get(rank, ()) if expert >= 0}
    return max(empty, experts - len(held))


@final
class _Draft:
    """A placement under construction. The copies of an expert are the ranks that hold it; `share[expert]` maps them to their parts."""

    def __init__(self, loads: list[float], residents: Mapping[int, Sequence[int]], ranks: list[int], slots: int) -> None:
        self.loads = loads
        self.ranks = ranks
        self.slots = slots
        self.held: dict[int, list[int]] = {}
        self.copies: list[dict[int, float]] = [{} for _ in loads]
        self.load: dict[int, float] = dict.fromkeys(ranks, 0.0)
        for rank in ranks:
            seen: set[int] = set()
            row = [EMPTY_SLOT] * slots
            for slot, expert in enumerate(list(residents.get(rank, ()))[:slots]):
                if 0 <= expert < len(loads) and expert not in seen:
                    row[slot] = expert
                    seen.add(expert)
                    self.copies[expert][rank] = 0.0
            self.held[rank] = row
        self.kept = {(rank, expert) for rank, row in self.held.items() for expert in row if expert >= 0}
        self.even_out(range(len(loads)))

    # -- the three stages -------------------------------------------------------------------------------------------------

    def cover(self) -> None:
        """Give every expert that nobody keeps a slot, the hottest first, on the rank with most room."""
        for expert in sorted((e for e, copies in enumerate(self.copies) if not copies), key=lambda e: -self.loads[e]):
            free = [rank for rank in self.ranks if EMPTY_SLOT in self.held[rank]]
            if free:
                rank = min(free, key=lambda r: (self.load[r], -self.held[r].count(EMPTY_SLOT)))
                self._put(expert, rank, self.held[rank].index(EMPTY_SLOT))
            else:
                rank, slot = min(self._spare_slots(), key=lambda place: self.load[place[0]] + self._cost_of_losing(*place))
                self._replace(expert, rank, slot)

    def fill(self) -> None:
        """Fill the slots that are left with further copies of the hottest experts, on the least loaded ranks."""
        heat = [(-load / max(1, len(copies)), expert) for expert, (load, copies) in enumerate(zip(self.loads, self.copies, strict=True))]
        heapq.heapify(heat)
        open_ranks = {rank for rank in self.ranks if EMPTY_SLOT in self.held[rank]}
        while open_ranks:
            rank = min(open_ranks, key=lambda r: (self.load[r], r))
            aside: list[tuple[float, int]] = []
            while heat and rank in self.copies[heat[0][1]]:
                aside.append(heapq.heappop(heat))
            if heat:
                expert = heapq.heappop(heat)[1]
                self._put(expert, rank, self.held[rank].index(EMPTY_SLOT))
                heapq.heappush(heat, (-self.loads[expert] / len(self.copies[expert]), expert))
            if not heat or EMPTY_SLOT not in self.held[rank]:
                open_ranks.discard(rank)  # full, or it holds every expert and its other slots stay empty
            for entry in aside:
                heapq.heappush(heat, entry)
        self.even_out(range(len(self.loads)))

    def balance(self, max_imbalance: float) -> None:
        """Replace spare copies by copies of what the busiest ranks are busy with, while that helps."""
        limit = len(self.ranks) * self.slots
        for _ in range(limit):
            before = self.imbalance()
            if before <= max_imbalance:
                return
            if not self._improve(before):
                return

    # -- steps ------------------------------------------------------------------------------------------------------------

    def _improve(self, before: float) -> bool:
        """Make one replacement or exchange that lowers the imbalance; cheap ones (slots that are received anyway) are tried first."""
        peak = max(self.load.values())
        busy = [rank for rank in self.ranks if self.load[rank] > peak * (1 - _CLOSE_ENOUGH)]
        hot = sorted(
            {expert for rank in busy for expert in self.held[rank] if expert >= 0},
            key=lambda e: -max(self.copies[e].get(rank, 0.0) for rank in busy) * self.loads[e],
        )
        idle = sorted(self.ranks, key=lambda r: self.load[r])
        for is_free in (True, False):
            for expert in hot[:8]:
                for rank in idle[: max(2, len(idle) // 2)]:
                    if rank in self.copies[expert]:
                        continue
                    spare = [
                        (slot, self._cost_of_losing(rank, slot))
                        for slot, held in enumerate(self.held[rank])
                        if held >= 0 and len(self.copies[held]) > 1 and ((rank, held) not in self.kept) == is_free
                    ]
                    for slot, _ in sorted(spare, key=lambda s: s[1])[:3]:
                        if self._try(expert, rank, slot, before):
                            return True
            if self._try_exchange(hot, idle, busy, before, is_free=is_free):
                return True
        return False

    def _try(self, expert: int, rank: int, slot: int, before: float) -> bool:
        old = self.held[rank][slot]
        saved = self._save()
        self._replace(expert, rank, slot)
        self.even_out({expert, old})
        if self.imbalance() < before * (1 - _CLOSE_ENOUGH / 2) or self._fewer_busy(saved, before):
            return True
        self._restore(saved)
        return False

    def _try_exchange(self, hot: list[int], idle: list[int], busy: list[int], before: float, *, is_free: bool) -> bool:
        """Exchange a sole copy on a busy rank with a cooler one on an idle rank: two slots to receive."""
        for expert in hot[:6]:
            for giver in [rank for rank in self.copies[expert] if rank in busy]:
                for taker in idle[:4]:
                    if taker in self.copies[expert]:
                        continue
                    for slot, other in self._cooler(taker, giver, expert)[:3]:
                        costs = [(giver, other) not in self.kept, (taker, expert) not in self.kept]
                        keeps = (giver, expert) in self.kept or (taker, other) in self.kept
                        if is_free and (keeps or not all(costs)):
                            continue
                        saved = self._save()
                        here = self.held[giver].index(expert)
                        self._drop(giver, here)
                        self._drop(taker, slot)
                        self._put(expert, taker, slot)
                        self._put(other, giver, here)
                        self.even_out({expert, other})
                        if self.imbalance() < before * (1 - _CLOSE_ENOUGH / 2) or self._fewer_busy(saved, before):
                            return True
                        self._restore(saved)
        return False

    def _cooler(self, taker: int, giver: int, expert: int) -> list[tuple[int, int]]:
        mine = self.loads[expert] * self.copies[expert][giver]
        gap = (self.load[giver] - self.load[taker]) / 2
        found = [
            (slot, other)
            for slot, other in enumerate(self.held[taker])
            if other >= 0 and giver not in self.copies[other] and self.loads[other] * self.copies[other][taker] < mine
        ]
        return sorted(found, key=lambda place: abs(mine - self.loads[place[1]] * self.copies[place[1]][taker] - gap))

    def _fewer_busy(self, saved: _Saved, before: float) -> bool:
        """With several ranks equally busy the peak stays until the last of them is relieved: then fewer of them is progress."""
        if self.imbalance() > before * (1 + 1e-9):
            return False
        peak = max(saved.load.values()) * (1 - _CLOSE_ENOUGH)
        return sum(load > peak for load in self.load.values()) < sum(load > peak for load in saved.load.values())

    def _spare_slots(self) -> list[tuple[int, int]]:
        return [
            (rank, slot)
            for rank in self.ranks
            for slot, expert in enumerate(self.held[rank])
            if expert >= 0 and len(self.copies[expert]) > 1
        ]

    def _cost_of_losing(self, rank: int, slot: int) -> float:
        """Load that the other copies of this slot's expert would take over, each."""
        expert = self.held[rank][slot]
        return self.loads[expert] * self.copies[expert][rank] / (len(self.copies[expert]) - 1)

    # -- the tables -------------------------------------------------------------------------------------------------------

    def _put(self, expert: int, rank: int, slot: int) -> None:
        self.held[rank][slot] = expert
        self.copies[expert][rank] = 0.0
        self._spread(expert)

    def _drop(self, rank: int, slot: int) -> None:
        expert = self.held[rank][slot]
        self.load[rank] -= self.loads[expert] * self.copies[expert].pop(rank)
        self.held[rank][slot] = EMPTY_SLOT
        if self.copies[expert]:
            self._spread(expert)

    def _replace(self, expert: int, rank: int, slot: int) -> None:
        self._drop(rank, slot)
        self._put(expert, rank, slot)

    def _spread(self, expert: int) -> float:
        """Share an expert's tokens out so that its ranks come as close to one level as they can; how much load changed place."""
        copies, weight = self.copies[expert], self.loads[expert]
        if len(copies) == 1:
            ((rank, share),) = copies.items()
            self.load[rank] += weight * (1.0 - share)
            copies[rank] = 1.0
            return weight * abs(1.0 - share)
        if weight <= 0.0:
            return self._spread_nothing(copies)
        rest = sorted((self.load[rank] - weight * share, rank) for rank, share in copies.items())
        level, total = 0.0, 0.0
        for count, (below, _) in enumerate(rest, 1):
            total += below
            level = (weight + total) / count
            if count == len(rest) or level <= rest[count][0]:
                break
        moved = 0.0
        for below, rank in rest:
            part = max(0.0, level - below)
            moved += abs(part - weight * copies[rank])
            self.load[rank] = below + part
            copies[rank] = part / weight
        return moved

    @staticmethod
    def _spread_nothing(copies: dict[int, float]) -> float:
        for rank in copies:
            copies[rank] = 1.0 / len(copies)
        return 0.0

    def even_out(self, first: Iterable[int]) -> None:
        """Sweep over the experts that have copies until their shares settle: the busiest rank is then as idle as shares can make it."""
        for expert in first:
            if self.copies[expert]:
                self._spread(expert)
        several = [expert for expert, copies in enumerate(self.copies) if len(copies) > 1]
        tolerance = _CLOSE_ENOUGH / 10 / max(1, len(self.ranks))
        for _ in range(_SWEEPS):
            if sum(map(self._spread, several)) < tolerance:
                return

    def imbalance(self) -> float:
        """Load of the busiest rank over the mean."""
        mean = sum(self.load.values()) / len(self.ranks)
        return max(self.load.values()) / mean if mean else 1.0

    def _save(self) -> _Saved:
        return _Saved({r: list(row) for r, row in self.held.items()}, [dict(c) for c in self.copies], dict(self.load))

    def _restore(self, saved: _Saved) -> None:
        self.held, self.copies, self.load = saved

    def plan(self, residents: Mapping[int, Sequence[int]]) -> ExpertPlan:
        """The finished plan; an expert that stays on its rank stays in its slot."""
        for rank, row in self.held.items():
            row[:] = _in_place(row, residents.get(rank, ()))
        holders: dict[int, list[int]] = {}
        for rank, row in residents.items():
            for expert in row:
                holders.setdefault(expert, []).append(rank)
        moves = [
            ExpertMove(expert, rank, slot, tuple(sorted(holders.get(expert, ()))))
            for rank, row in self.held.items()
            for slot, expert in enumerate(row)
            if expert >= 0 and (rank, expert) not in self.kept
        ]
        shares = {rank: tuple(self.copies[expert][rank] if expert >= 0 else 0.0 for expert in row) for rank, row in self.held.items()}
        return ExpertPlan({rank: tuple(row) for rank, row in self.held.items()}, shares, tuple(moves), self.imbalance())


class _Saved(NamedTuple):
    held: dict[int, list[int]]
    copies: list[dict[int, float]]
    load: dict[int, float]


def _in_place(row: list[int], before: Sequence[int]) -> list[int]:
    """The same experts, those that were there before in the slots that they had."""
    wanted = {expert for expert in row if expert >= 0}
    placed = [EMPTY_SLOT] * len(row)
    for slot, expert in enumerate(list(before)[: len(row)]):
        if expert in wanted:
            placed[slot] = expert
            wanted.discard(expert)
    others = iter([expert for expert in row if expert in wanted])
    return [next(others, EMPTY_SLOT) if expert == EMPTY_SLOT else expert for expert in placed]


def _normalised(loads: Sequence[float]) -> list[float]:
    total = float(sum(loads))
    if any(load < 0 for load in loads):
        msg = "a load is negative"
        raise ValueError(msg)
    return [float(load) / total for load in loads] if total else [1.0 / len(loads)] * len(loads)
