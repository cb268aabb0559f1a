"""Memberships in their order: first, without the lost, adopted by a new controller."""

from __future__ import annotations

import msgspec
import pytest

from actors.roster import adopt, brought_back, first_membership, newest, without, without_joining
from raycore.engine import EngineInfo
from raycore.ids import EngineId, Epoch, Incarnation, Rank
from raycore.membership import Departure, Endpoints, Member, Membership

INFO = EngineInfo("echo", "echo", 257, 64, 64, ("generate",))


def member(rank: int, incarnation: str = "a") -> Member:
    return Member(EngineId(Rank(rank), Incarnation(incarnation)), Endpoints("host", "ipc://r", "ipc://b"), INFO, pid=1000 + rank)


@pytest.fixture
def first() -> Membership:
    return first_membership("pool", [member(1), member(0), member(2)])


def test_the_first_membership_is_epoch_1_of_term_1_in_order_of_ranks(first: Membership) -> None:
    assert (first.term, first.epoch) == (1, 1)
    assert [m.engine.rank for m in first.members] == [0, 1, 2]


def test_a_loss_makes_a_new_epoch_with_its_cause(first: Membership) -> None:
    after = without(first, [Departure(member(1).engine, "killed")])
    assert after.supersedes(first)
    assert (after.term, after.epoch) == (1, 2)
    assert [m.engine.rank for m in after.members] == [0, 2]
    assert after.departed == (Departure(member(1).engine, "killed"),)


def test_an_expert_parallel_pool_that_loses_a_rank_loses_all_with_it(first: Membership) -> None:
    info = msgspec.structs.replace(INFO, sync_interval=1, is_expert_parallel=True)
    many = first_membership("pool", [msgspec.structs.replace(member(rank), info=info) for rank in range(20)])
    after = without(many, [Departure(member(1).engine, "killed")])
    assert after.members == ()
    assert after.lost_with(member(1).engine) is None, "its own death"
    assert {after.lost_with(member(rank).engine) for rank in range(20) if rank != 1} == {1}
    assert {departure.cause for departure in after.departed} == {"killed"}
    stranger = Departure(member(1, "older").engine, "killed")
    assert without(many, [stranger]) is many


def test_losing_a_stranger_changes_nothing(first: Membership) -> None:
    assert without(first, [Departure(member(1, "older").engine, "killed")]) is first


def test_only_the_last_departures_are_kept() -> None:
    membership = first_membership("pool", [member(rank) for rank in range(20)])
    for rank in range(20):
        membership = without(membership, [Departure(member(rank).engine, "killed")])
    assert [d.engine.rank for d in membership.departed] == list(range(4, 20))


def test_the_newest_view_wins_by_term_then_epoch(first: Membership) -> None:
    later_epoch = without(first, [Departure(member(0).engine, "killed")])
    later_term = msgspec.structs.replace(first, term=2)
    assert newest([first, later_epoch], "pool") is later_epoch
    assert newest([later_epoch, later_term], "pool") is later_term
    assert newest([], "pool").epoch == 0


def test_a_new_controller_keeps_the_epoch_when_all_answered(first: Membership) -> None:
    found = adopt([first, first], {m.engine for m in first.members}, "pool", "gone")
    assert (found.term, found.epoch) == (2, 1)
    assert found.members == first.members


def test_a_new_controller_fences_who_did_not_answer(first: Membership) -> None:
    found = adopt([first], {member(0).engine, member(2).engine}, "pool", "gone")
    assert (found.term, found.epoch) == (2, 2)
    assert [m.engine.rank for m in found.members] == [0, 2]
    assert found.departed == (Departure(member(1).engine, "gone"),)


def test_a_pool_that_was_never_up_is_adopted_as_empty() -> None:
    found = adopt([Membership("pool"), Membership("pool")], {member(0).engine}, "pool", "gone")
    assert found.members == ()


def test_a_pool_that_is_brought_back_has_its_old_members_as_they_are_now_and_mourns_only_the_lost(first: Membership) -> None:
    grown = msgspec.structs.replace(first, epoch=Epoch(5), members=(*first.members, member(3), member(4)), joining=(member(5),))
    back = brought_back(grown, first, [Departure(member(3).engine, "killed")])
    assert (back.epoch, back.members, back.joining) == (6, first.members, ())
    assert back.departed == (Departure(member(3).engine, "killed"),)
    assert not back.lost_with_another()


def test_an_operation_takes_its_own_joiners_out_of_the_membership(first: Membership) -> None:
    both = msgspec.structs.replace(first, joining=(member(3), member(4)))
    assert without_joining(both, {member(3).engine}).joining == (member(4),)
