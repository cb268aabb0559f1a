"""The groups of one rank, as its wave goes over to others and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raycore import waves
from raycore.core.group_rack import GroupRack
from raycore.groups import GroupKind, GroupSet
from raycore.ids import Epoch, GroupStamp, Rank, Term
from raycore.waves import Verdict, Vote, Wave, WaveStep

OLD, NEW, BACK = (GroupStamp(Epoch(epoch), Term(1)) for epoch in (1, 2, 3))
MEMBERS = (Rank(0), Rank(1))
JOINED = (*MEMBERS, Rank(2))
ALL_SWITCH = Verdict(goes_on=True, has_work=True, paused=0, carried=(Vote.SWITCH,))


class Group:
    """Open until it is closed."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Rig:
    """A rank that steps in the old groups and has new ones beside them; its engine keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.old, self.new = Group(), Group()
        self.rack = GroupRack(self)
        self.rack.take(_groups(OLD, self.old))
        self.rack.stand_by(_groups(NEW, self.new))
        self.wave = waves.on_standby(waves.on_group(Wave(Rank(0)), OLD, MEMBERS).wave, NEW, JOINED).wave

    def set_group(self, group: Any) -> None:
        self.given.append(group)

    def do(self, event: Callable[..., WaveStep], *arguments: Any) -> None:
        before, self.wave = self.wave, event(self.wave, *arguments).wave
        self.rack.follow(before, self.wave)

    def vote_in_a_round(self) -> None:
        self.do(waves.on_reducing)
        self.do(waves.on_reduced, OLD, ALL_SWITCH)


def _groups(stamp: GroupStamp, group: Any) -> GroupSet:
    return GroupSet(stamp, dict.fromkeys(GroupKind, group))


def test_a_rank_that_switched_and_one_that_had_not_begin_anew_in_the_group_that_they_go_back_to() -> None:
    switched, late = Rig(), Rig()
    switched.do(waves.on_told, NEW)
    switched.vote_in_a_round()
    switched.do(waves.on_returned, BACK)
    late.do(waves.on_returned, BACK)  # told that the joiner is lost before it made the round
    late.vote_in_a_round()
    for rig in (switched, late):
        assert rig.wave.stamp == BACK
        assert rig.given[-1] is rig.old
        assert not rig.old.is_closed
        assert rig.new.is_closed
    assert switched.given == [switched.old, switched.new, switched.old]
    assert late.given == [late.old, late.old]


def test_an_undone_switch_leaves_the_engine_where_it_is() -> None:
    rig = Rig()
    rig.do(waves.on_dropped, NEW)
    assert rig.given == [rig.old]
    assert rig.new.is_closed


class ElasticRig(Rig):
    """Its engine takes part in switches, and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        super().__init__()

    def prepare(self, _reconfiguration: Any, _groups: Any) -> None:
        self.told.append("prepare")

    def switch(self) -> None:
        self.told.append("switch")

    def switch_back(self) -> None:
        self.told.append("switch back")

    def release(self) -> None:
        self.told.append("release")

    def drop(self) -> None:
        self.told.append("drop")


def test_an_engine_keeps_what_it_had_until_the_release_also_where_the_old_group_broke() -> None:
    back, done = ElasticRig(), ElasticRig()
    for rig in (back, done):
        rig.do(waves.on_told, NEW)
        rig.do(waves.on_failed, OLD)  # decided, so it goes over without a vote, and keeps no group
        assert rig.wave.stamp == NEW
        assert rig.told == ["switch"]
        assert rig.old.is_closed
    done.rack.release()
    done.rack.release()
    assert done.told == ["switch", "release"]
    back.do(waves.on_returned, BACK)
    assert back.told == ["switch", "switch back"]
    assert back.given[-1] is None, "it has no group until the controller gives the members one"


def test_an_engine_whose_members_are_others_than_before_lets_go_of_what_it_had() -> None:
    rig = ElasticRig()
    rig.do(waves.on_told, NEW)
    rig.vote_in_a_round()
    rig.do(waves.on_told, BACK)
    assert rig.told == ["switch", "release"]
