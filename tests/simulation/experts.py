"""A simulated engine core of an expert-parallel pool: which experts it holds, and where it believes the others to be."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from elastic.experts import EMPTY_SLOT
from raycore.engines.expert_change import ExpertChange, ExpertReport
from raycore.errors import LockstepError
from raycore.groups import GroupKind, GroupSet, ProcessGroup, Reconfiguration
from raycore.ids import GroupStamp
from raycore.membership import ReconfigureDistributedRequest
from tests.simulation.engine import GROUP_S, SimEngine, over
from tests.simulation.wires import WireEnd

EXPERTS = 6
_LAYER = "0"

Rows = tuple[tuple[int, ...], ...]


class SimExpertEngine(SimEngine):
    """An `ElasticEngine`: its experts go along in a switch of groups. A step needs one placement, the same at all ranks and true."""

    def __init__(self, world: Any, engine: Any, group_id: str, sync_interval: int, *, is_joining: bool, size: int) -> None:
        super().__init__(world, engine, group_id, sync_interval, is_expert_parallel=True)
        self.placed: Rows = () if is_joining else tuple(tuple(range(rank, EXPERTS, size)) for rank in range(size))
        self.held: frozenset[int] = frozenset() if is_joining else frozenset(self.placed[engine.rank])
        self.coming: tuple[Rows, frozenset[int]] | None = None
        self.before: tuple[Rows, frozenset[int]] | None = None

    def set_group(self, group: ProcessGroup | None) -> None:
        """A group that is gone back to goes on where it was left; not everybody has left it."""
        super().set_group(group)
        self.steps = group.begun if isinstance(group, WireEnd) else 0

    def word(self) -> int:
        """What every step tells, and must be the same at all ranks."""
        group = self.group
        assert group is not None
        self.world.check(len(self.placed) == group.size, f"{self.id} steps in a group of {group.size} with experts on {len(self.placed)}")
        if len(self.placed) == group.size:
            own = set(self.placed[group.rank]) - {EMPTY_SLOT}
            self.world.check(own <= self.held, f"{self.id} steps without experts {own - self.held}")
        everywhere = {expert for row in self.placed for expert in row} - {EMPTY_SLOT}
        self.world.check(len(everywhere) == EXPERTS, f"{self.id} steps with experts {everywhere} only")
        return sum((at + 1) * (expert + 2) * 31**rank for rank, row in enumerate(self.placed) for at, expert in enumerate(row))

    async def expert_report(self, _limit_s: float) -> ExpertReport:
        return ExpertReport({_LAYER: [list(row) for row in self.placed]}, {_LAYER: [1] * EXPERTS})

    async def prepare_experts(self, request: ReconfigureDistributedRequest, stamp: GroupStamp, groups: GroupSet) -> None:
        """What `ExpertSwitch.prepare` does: all meet until everyone has what it shall have."""
        change: ExpertChange = request.expert_plan
        rows = tuple(change.after[_LAYER].get(member.engine.rank, ()) for member in request.membership.members)
        wanted = frozenset(change.after[_LAYER].get(self.id.rank, ())) - {EMPTY_SLOT}
        carrier = groups[GroupKind.EPLB if request.handover is None else GroupKind.HANDOVER]
        holders = np.array([int(expert in self.held) for expert in range(EXPERTS)], np.int64)
        if self.coming is not None or self.before is not None:
            raise LockstepError(f"{self.id}: another change of the experts' placement is under way")
        self.coming = (rows, self.held | wanted)
        assert isinstance(carrier, WireEnd)
        try:
            await asyncio.wait_for(over(carrier.begin_sum(holders)), GROUP_S)
        except TimeoutError:
            raise LockstepError(f"{self.id}: the others of {stamp} do not take part") from None
        self.world.check(all(holders[expert] for expert in wanted), f"{self.id} gets experts for {stamp} that nobody has")

    # -- ElasticEngine ---------------------------------------------------------------------------------------------------------

    def prepare(self, reconfiguration: Reconfiguration, groups: GroupSet) -> None:
        raise NotImplementedError("simulated ranks do not block")

    def switch(self) -> None:
        assert self.coming is not None
        self.before, (self.placed, self.held), self.coming = (self.placed, self.held), self.coming, None
        self._step_in_live()

    def switch_back(self) -> None:
        assert self.before is not None
        self.placed, self.held = self.before
        self.release()
        self._step_in_live()

    def _step_in_live(self) -> None:
        assert self.lockstep is not None
        live = self.lockstep._rack.live
        self.set_group(None if live is None else live[GroupKind.EP])

    def release(self) -> None:
        self.coming = self.before = None

    def drop(self) -> None:
        self.release()
