"""How memberships follow from one another: the first, the one without a lost engine, the one of a new controller. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from raycore.ids import EngineId, Epoch, Term
from raycore.membership import Departure, Member, Membership

_DEPARTURES_KEPT = 16


def first_membership(pool: str, members: Iterable[Member]) -> Membership:
    """Epoch 1 of term 1."""
    return Membership(pool=pool, epoch=Epoch(1), term=Term(1), members=tuple(sorted(members, key=lambda m: m.engine.rank)))


def without(membership: Membership, causes: Sequence[Departure]) -> Membership:
    """The next epoch: the same members except those that departed; the same epoch when none of them was a member."""
    lost = {departure.engine for departure in causes}
    stay = tuple(member for member in membership.members if member.engine not in lost)
    if len(stay) == len(membership.members):
        return membership
    known = [departure for departure in causes if membership.has(departure.engine)]
    return msgspec.structs.replace(
        membership,
        epoch=Epoch(membership.epoch + 1),
        members=stay,
        departed=(*membership.departed, *known)[-_DEPARTURES_KEPT:],
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
    return msgspec.structs.replace(without(found, gone), term=Term(found.term + 1))
