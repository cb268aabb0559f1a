"""How memberships follow from one another: the first, the one without a lost engine, the one of a new controller. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from raycore.ids import EngineId, Epoch, Term
from raycore.membership import Departure, Member, Membership, MemberState

_DEPARTURES_KEPT = 16


def first_membership(pool: str, members: Iterable[Member]) -> Membership:
    """Epoch 1 of term 1."""
    return Membership(pool=pool, epoch=Epoch(1), term=Term(1), members=tuple(sorted(members, key=lambda m: m.engine.rank)))


def without(membership: Membership, causes: Sequence[Departure]) -> Membership:
    """The next epoch: the same members except those that departed; the same epoch when none of them was a member.

    An expert-parallel pool that loses a member loses all: they depart with it.
    """
    lost = {departure.engine for departure in causes}
    first = next((departure for departure in causes if membership.has(departure.engine)), None)
    if first is not None and membership.is_expert_parallel:
        others = [member.engine for member in membership.members if member.engine not in lost]
        causes = [*causes, *(Departure(engine, first.cause, first.engine.rank) for engine in others)]
        lost.update(others)
    stay = tuple(member for member in membership.members if member.engine not in lost)
    if len(stay) == len(membership.members):
        return membership
    known = [departure for departure in causes if membership.has(departure.engine)]
    return msgspec.structs.replace(
        membership,
        epoch=Epoch(membership.epoch + 1),
        members=stay,
        departed=(*membership.departed, *known)[-max(_DEPARTURES_KEPT, len(known)) :],
    )


def brought_back(now: Membership, before: Membership, causes: Sequence[Departure]) -> Membership:
    """The next epoch: the members of `before` and nobody else, as they are now; whoever joined since is no member, and not mourned."""
    was = {member.engine for member in before.members}
    return msgspec.structs.replace(
        now,
        epoch=Epoch(now.epoch + 1),
        members=tuple(member for member in now.members if member.engine in was),
        departed=(*now.departed, *causes)[-_DEPARTURES_KEPT:],
        joining=(),
    )


def newest(views: Iterable[Membership], pool: str) -> Membership:
    """The view that supersedes all others; an empty epoch 0 when there is none."""
    best = Membership(pool=pool)
    for view in views:
        if view.supersedes(best):
            best = view
    return best


def adopt(views: Iterable[Membership], alive: set[EngineId], pool: str, cause: str) -> Membership:
    """What a restarted controller declares: the newest view in a higher term, without the members that did not answer it."""
    found = newest(views, pool)
    gone = [Departure(member.engine, cause) for member in found.members if member.engine not in alive]
    return msgspec.structs.replace(without(found, gone), term=Term(found.term + 1), joining=())


def renewed(membership: Membership, epoch: Epoch) -> Membership:
    """The same members in the next epoch, without the groups that broke; unchanged when `epoch` is past already."""
    if membership.epoch != epoch:
        return membership
    return msgspec.structs.replace(membership, epoch=Epoch(epoch + 1), group=None)


def with_joining(membership: Membership, joining: Sequence[Member]) -> Membership:
    """The next epoch, in which these are about to join."""
    return msgspec.structs.replace(membership, epoch=Epoch(membership.epoch + 1), joining=tuple(joining))


def without_joining(membership: Membership, engines: Collection[EngineId]) -> Membership:
    """The next epoch, in which these are not about to join any more."""
    joining = tuple(member for member in membership.joining if member.engine not in engines)
    return msgspec.structs.replace(membership, epoch=Epoch(membership.epoch + 1), joining=joining)


def with_members(membership: Membership, added: Sequence[Member]) -> Membership:
    """The next epoch with these members too."""
    members = tuple(sorted((*membership.members, *added), key=lambda member: member.engine.rank))
    joining = tuple(member for member in membership.joining if member not in added)
    return msgspec.structs.replace(membership, epoch=Epoch(membership.epoch + 1), members=members, joining=joining)


def with_states(
    membership: Membership, states: dict[EngineId, MemberState], mapped: dict[MemberState, MemberState] | None = None
) -> Membership:
    """The next epoch with these members in these states."""
    mapped = mapped or {}
    members = tuple(
        msgspec.structs.replace(member, state=states.get(member.engine, mapped.get(member.state, member.state)))
        for member in membership.members
    )
    return msgspec.structs.replace(membership, epoch=Epoch(membership.epoch + 1), members=members)


def without_engine(membership: Membership, engine: EngineId) -> Membership:
    """The next epoch without an engine that left by choice: no departure, for it was no loss."""
    members = tuple(member for member in membership.members if member.engine != engine)
    return msgspec.structs.replace(membership, epoch=Epoch(membership.epoch + 1), members=members)
