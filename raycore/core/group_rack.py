"""The groups that one rank holds: the live ones, those that stand by, those that it may go back to. They follow the wave machine.

Used on the step thread only. An engine that takes part in switches (`raycore/groups.py: ElasticEngine`) is told of each one here.
"""

from __future__ import annotations

import logging
from typing import Any

from raycore.groups import ElasticEngine, GroupKind, GroupSet, ProcessGroup, as_lockstep
from raycore.waves import Phase, Wave

_log = logging.getLogger(__name__)


class GroupRack:
    """Owns the groups; nobody else closes one."""

    def __init__(self, engine: Any) -> None:
        self.live: GroupSet | None = None
        self.standby: GroupSet | None = None
        self.kept: GroupSet | None = None
        self._engine = as_lockstep(engine)
        self._elastic = engine if isinstance(engine, ElasticEngine) else None
        self._has_old = False
        """The engine switched, and keeps what it switched from; longer than the old groups, which may have broken."""

    @property
    def rounds(self) -> ProcessGroup:
        """The group of the waves' rounds; a wave steps only in a group."""
        assert self.live is not None  # noqa: S101 -- as its docstring says
        return self.live[GroupKind.DP]

    def take(self, groups: GroupSet) -> None:
        """The groups of an epoch that was not prepared for: at the start, after a death."""
        self.close()
        self.live = groups
        self._engine.set_group(groups[GroupKind.EP])

    def stand_by(self, groups: GroupSet | None) -> None:
        """Groups that may be switched to; at a rank that will leave none, or the one in which it hands over what it holds."""
        _close(self.standby)
        self.standby = groups

    def holds(self, groups: GroupSet) -> bool:
        """Whether these were handed over."""
        return any(groups is held for held in (self.live, self.standby, self.kept))

    def drop_unused(self) -> None:
        """The engine prepared for groups that never stood by."""
        if self._elastic is not None:
            self._elastic.drop()

    def follow(self, before: Wave, after: Wave) -> None:
        """Do with the groups what the machine did with the wave."""
        if before.standby is not None and after.standby is None:
            self._leave_standby(before, after)
        elif after.stamp != before.stamp:
            self._change(before, after)
        elif after.phase is Phase.BROKEN and before.phase is not Phase.BROKEN:
            self._let_go_of_live()
        if before.kept and not after.kept and after.stamp == before.stamp:
            _close(self.kept)
            self.kept = None
            self.release()

    def release(self) -> None:
        """Every member has confirmed the live groups: the engine lets go of what it switched from. Idempotent."""
        if self._elastic is not None and self._has_old:
            self._elastic.release()
        self._has_old = False

    def close(self) -> None:
        """Leave every group. Idempotent."""
        self._let_go_of_live()
        _close(self.standby)
        _close(self.kept)
        self.standby = self.kept = None

    def _leave_standby(self, before: Wave, after: Wave) -> None:
        assert before.standby is not None  # noqa: S101 -- its caller looked
        if after.stamp == before.standby.stamp and after.phase is not Phase.OUT:
            self._switch(keeps=bool(after.kept))
            return
        _close(self.standby)
        self.standby = None
        if self._elastic is not None:
            self._elastic.drop()
        if after.stamp == before.stamp:
            return  # undone
        if after.phase not in (Phase.RESTING, Phase.STEPPING):
            self.close()
        elif self._elastic is None and self.live is not None:
            # The switch was made and taken back at once; ranks that were there meanwhile are given this group anew, and count from there.
            self._engine.set_group(self.live[GroupKind.EP])

    def _switch(self, *, keeps: bool) -> None:
        _close(self.kept)
        self.kept, self.live, self.standby = self.live, self.standby, None
        assert self.live is not None  # noqa: S101 -- a member has what it switches to
        self.live.leave(GroupKind.HANDOVER)
        if not keeps:
            _close(self.kept)
            self.kept = None
        if self._elastic is None:
            self._engine.set_group(self.live[GroupKind.EP])
            return
        self._elastic.switch()
        self._has_old = True

    def _change(self, before: Wave, after: Wave) -> None:
        """Another epoch without a vote of this rank: the kept groups, or none until new ones are formed."""
        if before.kept and after.phase is Phase.RESTING and after.members == before.kept and self.kept is not None:
            _close(self.live)
            self.live, self.kept = self.kept, None
            if self._elastic is None:
                self._engine.set_group(self.live[GroupKind.EP])
            else:
                self._elastic.switch_back()
                self._has_old = False
            return
        self.close()
        if after.phase is not Phase.BROKEN:
            self.release()
        elif self._elastic is not None and self._has_old:
            # Back without a group: the old one broke before the switch. What the engine had goes with the members, in whatever group.
            self._elastic.switch_back()
            self._has_old = False
            self._engine.set_group(None)

    def _let_go_of_live(self) -> None:
        if self.live is not None:
            self.live.close()
            self.live = None
            self._engine.set_group(None)


def _close(groups: GroupSet | None) -> None:
    if groups is not None:
        groups.close()
