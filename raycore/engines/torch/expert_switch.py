"""An expert-parallel engine's part in a change of the pool's members: what `raycore/core` calls at each stage of a switch of groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import msgspec

from raycore.engines.expert_change import ExpertChange
from raycore.engines.torch.expert_moves import plan_of
from raycore.engines.torch.expert_parallel import ExpertParallel
from raycore.errors import ConfigurationError
from raycore.groups import GroupKind, GroupSet, ProcessGroup, Reconfiguration

_PORTION_BYTES = 64 << 20
"""What a rank sends, and receives, in one exchange; it bounds the buffers, not the speed."""


@final
class ExpertSwitch:
    """`prepare` runs on a thread of its own while steps go on, everything else on the step thread, between steps."""

    def __init__(self, experts: ExpertParallel, on_changed: Callable[[], None]) -> None:
        """`on_changed`: called when this rank computes with other tensors, or in another group, than before."""
        self._experts = experts
        self._on_changed = on_changed
        self._next: ProcessGroup | None = None
        self._before: ProcessGroup | None = None

    def prepare(self, reconfiguration: Reconfiguration, groups: GroupSet) -> None:
        """Have all experts that this rank shall have beside those that it has; blocks until the other members have theirs too.

        The plan is an `ExpertChange`, perhaps as plain data; experts travel in the handover group where a rank leaves, else in the EPLB
        group, and tokens will in the EP group. A leaver sends, and keeps what it has. ConfigurationError for an epoch without a plan, or
        with one that cannot be.
        """
        try:
            change = msgspec.convert(reconfiguration.expert_plan, ExpertChange, strict=False, from_attributes=True)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"the next epoch has no plan of its experts: {error}") from error
        carriers = reconfiguration.handover or reconfiguration.ranks
        carrier = groups[GroupKind.HANDOVER if reconfiguration.handover else GroupKind.EPLB]
        self._experts.prepare(plan_of(change, carriers, reconfiguration.ranks), carrier, budget_bytes=_PORTION_BYTES)
        while not self._experts.advance():
            pass
        self._next = groups.get(GroupKind.EP)

    def switch(self) -> None:
        """Tokens go to where experts are now, in the new group; the old placement and group are kept."""
        self._experts.switch()
        self._take(self._next)

    def switch_back(self) -> None:
        """The old placement in the old group again; what was prepared is let go."""
        self._experts.revert()
        self._take(self._before)
        self.drop()

    def release(self) -> None:
        """The old placement is let go."""
        self._experts.drop()
        self._next = self._before = None

    def drop(self) -> None:
        """What was prepared is let go. Idempotent."""
        self.release()

    def _take(self, group: ProcessGroup | None) -> None:
        self._before = self._experts.exchange.swap_group(group)
        self._on_changed()
