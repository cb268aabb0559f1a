"""Three ranks in lockstep, their collective, network and controller as one small state, so that every order of events can be tried.

The network forgets nothing: a Wake for any wave that any rank was ever in may reach anyone at any time, any number of times, or never.
That is late, repeated, reordered and lost messages, the peers' and the coordinator's, in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from raycore.ids import Epoch, GroupStamp, Rank, Term
from raycore.waves import (
    Phase,
    Wave,
    WaveStep,
    ballot,
    on_dropped,
    on_failed,
    on_group,
    on_reduced,
    on_reducing,
    on_released,
    on_returned,
    on_standby,
    on_step,
    on_told,
    on_wake,
    on_work,
    position,
    verdict,
)

Sums = tuple[int, ...]
FAILED: Sums = ()
_LONGEST_WORK = 2
"""Work is done in this round of a wave at the latest; without a bound there would be no end of states."""


class RankState(NamedTuple):
    """One rank. `ballot`: what it put into the round in flight; `result`: the round's sums, not taken in yet; FAILED: it failed here."""

    wave: Wave
    has_work: bool = False
    is_paused: bool = False
    is_alive: bool = True
    ballot: Sums | None = None
    result: Sums | None = None

    @property
    def can_work(self) -> bool:
        return self.has_work and not self.is_paused


class World(NamedTuple):
    """Everything. `decided`: the members of each stamp (epochs from 1 on); `formed`: whether all of them met; `seen`: its newest wave.

    `before`: for an epoch of a standby group, the one that it stood beside; for a return, the one whose kept group it is; else -1.
    `standby`: the epoch whose group stands by, or is being switched to; `is_gone_for`: whether that is decided.
    `has_switches`: what comes from outside is about the switch that was prepared, and no other epoch is decided.
    """

    ranks: tuple[RankState, ...]
    decided: tuple[tuple[Rank, ...], ...]
    formed: tuple[bool, ...]
    seen: tuple[int, ...]
    before: tuple[int, ...] = (-1,)
    returns: tuple[bool, ...] = (False,)
    standby: int = -1
    is_gone_for: bool = False
    has_switches: bool = False

    @property
    def newest(self) -> int:
        """The epoch that holds: not one whose standby group is not decided, or was undone."""
        last = len(self.decided) - 1
        while (last == self.standby and not self.is_gone_for) or not self.decided[last]:
            last -= 1
        return last

    @property
    def participants(self) -> set[Rank]:
        return {*self.decided[self.standby], *self.decided[self.before[self.standby]]}


Move = tuple[str, World]


def stamp(index: int) -> GroupStamp:
    return GroupStamp(Epoch(index + 1), Term(1))


def index(wave: Wave) -> int:
    return wave.stamp.epoch - 1


def new_world(members: tuple[int, ...], size: int, sync_interval: int = 1) -> World:
    group = tuple(Rank(rank) for rank in members)
    waves = [Wave(Rank(rank), sync_interval=sync_interval) for rank in range(size)]
    ranks = tuple(RankState(on_group(wave, stamp(0), group).wave if wave.me in group else wave) for wave in waves)
    return World(ranks, (group,), (True,), (-1,))


# -- what the ranks and their surroundings do by themselves ---------------------------------------------------------------------


def inner_moves(world: World) -> Iterator[Move]:
    """Everything that may happen next without anyone asking for something new."""
    for me, rank in enumerate(world.ranks):
        if rank.is_alive:
            yield from _own_moves(world, me, rank)
            yield from _wakes(world, me, rank)
            yield from _told(world, me, rank)
            yield from _not_formed(world, me, rank)
            yield from _standby_moves(world, me, rank)


def _standby_moves(world: World, me: int, rank: RankState) -> Iterator[Move]:
    wave, here = rank.wave, world.standby
    if may_prepare(world, me, rank):
        prepared = on_standby(wave, stamp(here), world.decided[here]).wave
        yield f"{me} has the standby group of epoch {here + 1}", replace(world, me, rank._replace(wave=prepared))
    if wave.standby is not None and not world.decided[wave.standby.stamp.epoch - 1]:
        yield f"{me} hears that {wave.standby.stamp} was undone", drop(world, me, rank)
    if is_confirmed(world) and wave.kept:
        yield f"{me} hears that all have confirmed", replace(world, me, rank._replace(wave=on_released(wave, wave.stamp).wave))


def _is_long_vote(world: World, wave: Wave) -> bool:
    """Rounds that only wait for a vote go on until the last rank is told; without a bound there would be no end of states."""
    return wave.round >= _LONGEST_WORK and any(
        rank.is_alive and rank.wave.standby is not None and not rank.wave.is_decided and index(rank.wave) < world.newest
        for rank in world.ranks
    )


def may_prepare(world: World, me: int, rank: RankState) -> bool:
    """A standby group is formed where the live one is, or at ranks that have none."""
    here, wave = world.standby, rank.wave
    if here < 0 or world.is_gone_for or me not in world.participants or (wave.standby is not None and wave.standby.stamp == stamp(here)):
        return False
    if me in world.decided[world.before[here]]:
        return index(wave) == world.before[here] and wave.phase in (Phase.RESTING, Phase.STEPPING)
    return wave.phase is Phase.OUT and index(wave) < here


def drop(world: World, me: int, rank: RankState) -> World:
    assert rank.wave.standby is not None
    if rank.wave.is_decided:
        return world  # a newer epoch overtakes it
    return replace(world, me, rank._replace(wave=on_dropped(rank.wave, rank.wave.standby.stamp).wave))


def is_confirmed(world: World) -> bool:
    """Whether the controller has heard from every member of the switch that it has made a round in the new group."""
    return world.is_gone_for and all(
        world.ranks[member].wave.stamp == stamp(world.standby)
        and not world.ranks[member].wave.is_confirming
        and world.ranks[member].wave.phase in (Phase.RESTING, Phase.STEPPING)
        for member in world.decided[world.standby]
    )


def _own_moves(world: World, me: int, rank: RankState) -> Iterator[Move]:
    wave = rank.wave
    if wave.phase is Phase.RESTING and (rank.can_work or wave.votes):
        yield f"{me} notices its work or its vote", replace(world, me, rank._replace(wave=checked(on_work(wave), rank)))
    if wave.may_reduce and not _is_long_vote(world, wave):
        yield f"{me} begins a round", _begin_round(world, me, rank)
    if rank.result is not None:
        yield f"{me} takes the round's result", take_result(world, me, rank)
    if rank.ballot is not None and is_deserted(world, wave):
        yield f"{me}'s round fails", fail(world, me, rank)
    if rank.result not in (None, FAILED) and is_deserted(world, wave):
        yield f"{me}'s round fails, which was complete elsewhere", fail(world, me, rank)
    if wave.may_step:
        stepped = rank._replace(wave=on_step(wave).wave)
        if rank.can_work:
            yield f"{me} steps and is done", replace(world, me, stepped._replace(has_work=False))
        if not rank.can_work or wave.round < _LONGEST_WORK:
            yield f"{me} steps", replace(world, me, stepped)
    if wave.phase is Phase.OUT and is_formed(world, wave) and me in world.decided[index(wave)]:
        yield f"{me} has its group", form(world, me, rank)


def _wakes(world: World, me: int, rank: RankState) -> Iterator[Move]:
    """Only wakes that change something; `test_what_is_stale_changes_nothing` covers the others."""
    here = index(rank.wave)
    if here < 0 or rank.wave.phase not in (Phase.RESTING, Phase.STEPPING):
        return
    for number in range(rank.wave.wave, world.seen[here] + 1):
        taken = on_wake(rank.wave, stamp(here), number)
        assert taken.wave.phase is not Phase.BROKEN, f"a Wake broke a group that was whole: {rank.wave}, {number}"
        if taken.wave != rank.wave:
            yield f"{me} hears Wake({number})", replace(world, me, rank._replace(wave=checked(taken, rank)))


def _not_formed(world: World, me: int, rank: RankState) -> Iterator[Move]:
    wave = rank.wave
    if wave.phase is Phase.OUT and index(wave) >= 0 and me in world.decided[index(wave)] and is_deserted(world, wave):
        yield f"{me}'s group is not formed in time", fail(world, me, rank)


def _told(world: World, me: int, rank: RankState) -> Iterator[Move]:
    for newer in range(max(index(rank.wave) + 1, 0), world.newest + 1):
        if world.decided[newer] and not (newer == world.standby and me not in world.participants):
            told = tell(world, me, rank, newer)
            if told != world:
                yield f"{me} is told of epoch {newer + 1}", told


# -- what may be asked of them --------------------------------------------------------------------------------------------------


def outer_moves(world: World) -> Iterator[Move]:
    """Everything that may come from outside."""
    for me, rank in enumerate(world.ranks):
        if not rank.is_alive:
            continue
        if not rank.has_work:
            yield f"work for {me}", replace(world, me, rank._replace(has_work=True))
        if not world.has_switches:
            yield f"{'resume' if rank.is_paused else 'pause'} {me}", replace(world, me, rank._replace(is_paused=not rank.is_paused))
        yield f"{me} dies", replace(world, me, rank._replace(is_alive=False, ballot=None, result=None))
    alive = tuple(Rank(me) for me, rank in enumerate(world.ranks) if rank.is_alive)
    if world.has_switches:
        yield from _switches(world)
        return
    groups = {alive} | {tuple(other for other in alive if other != me) for me in alive}
    for group in sorted(groups - {()}):
        yield f"epoch {len(world.decided) + 1} is decided: {group}", decide(world, group)


def _switches(world: World) -> Iterator[Move]:
    here = world.standby
    if here < 0:
        return
    if not world.is_gone_for:
        yield f"epoch {here + 1} is undone", undone(world)
        if all(world.ranks[rank].is_alive and _has_standby(world, world.ranks[rank].wave) for rank in world.participants):
            yield f"epoch {here + 1} is gone for", world._replace(is_gone_for=True)
    elif may_return(world):
        yield f"epoch {len(world.decided) + 1} returns to the group of epoch {world.before[here] + 1}", give_back(world)


def _has_standby(world: World, wave: Wave) -> bool:
    return wave.standby is not None and wave.standby.stamp == stamp(world.standby)


def decide(world: World, group: tuple[Rank, ...]) -> World:
    return _more(world, group, before=-1)._replace(standby=-1, is_gone_for=False)


def stand_by(world: World, group: tuple[Rank, ...]) -> World:
    """A standby group of these is formed beside the newest."""
    return _more(world, group, before=world.newest)._replace(standby=len(world.decided), is_gone_for=False)


def undone(world: World) -> World:
    """Nobody is told of an epoch that was not decided, and its number is not used again."""
    here = world.standby
    if here < 0 or world.is_gone_for:
        return world
    return world._replace(standby=-1, decided=(*world.decided[:here], (), *world.decided[here + 1 :]))


def may_return(world: World) -> bool:
    """A joiner is lost before the controller has heard from all, and every old member lives and stays."""
    here = world.standby
    old, new = world.decided[world.before[here]], world.decided[here]
    lost = [rank for rank in new if not world.ranks[rank].is_alive]
    has_released = any(world.ranks[rank].wave.stamp == stamp(here) and not world.ranks[rank].wave.kept for rank in old)
    return bool(lost) and set(old) <= set(new) and not set(lost) & set(old) and not has_released


def give_back(world: World) -> World:
    old = world.before[world.standby]
    more = _more(world, world.decided[old], before=old)._replace(standby=-1, is_gone_for=False)
    return more._replace(returns=(*more.returns[:-1], True))


def _more(world: World, group: tuple[Rank, ...], before: int) -> World:
    return world._replace(
        decided=(*world.decided, group),
        formed=(*world.formed, False),
        seen=(*world.seen, -1),
        before=(*world.before, before),
        returns=(*world.returns, False),
    )


def wires(world: World, here: int) -> int:
    """Which group an epoch's collectives run on: its own, or the kept one that it goes back to."""
    while here >= 0 and world.returns[here]:
        here = world.before[here]
    return here


# -- transitions ----------------------------------------------------------------------------------------------------------------


def replace(world: World, me: int, rank: RankState) -> World:
    """Put a rank in place; note what follows for the round, the group and the network."""
    ranks = (*world.ranks[:me], rank, *world.ranks[me + 1 :])
    seen, here = world.seen, index(rank.wave)
    if rank.wave.phase is Phase.STEPPING and rank.wave.wave > seen[here]:
        seen = (*seen[:here], rank.wave.wave, *seen[here + 1 :])
    return world._replace(ranks=ranks, seen=seen)


def checked(step: WaveStep, rank: RankState) -> Wave:
    assert step.wave.me == rank.wave.me
    return step.wave


def _begin_round(world: World, me: int, rank: RankState) -> World:
    mine = tuple(ballot(rank.wave, has_work=rank.can_work, is_paused=rank.is_paused))
    world = replace(world, me, rank._replace(wave=on_reducing(rank.wave).wave, ballot=mine))
    members = world.decided[index(rank.wave)]
    peers = [world.ranks[member] for member in members]
    on = wires(world, index(rank.wave))
    together = [peer for peer in peers if peer.ballot is not None and wires(world, index(peer.wave)) == on]
    for peer in together:
        assert peer.wave.stamp == rank.wave.stamp, f"two ranks in one group under different stamps: {peer.wave} {rank.wave}"
        assert position(peer.wave) == position(rank.wave), f"two ranks in one round at different places: {peer.wave} {rank.wave}"
    if len(together) < len(members):
        return world
    sums = tuple(sum(column) for column in zip(*(peer.ballot for peer in together if peer.ballot), strict=True))
    for member in members:
        world = replace(world, member, world.ranks[member]._replace(ballot=None, result=sums))
    return world


def take_result(world: World, me: int, rank: RankState) -> World:
    assert rank.result
    step = on_reduced(rank.wave, rank.wave.stamp, verdict(rank.wave, rank.result))
    return replace(world, me, rank._replace(wave=checked(step, rank), result=None))


def fail(world: World, me: int, rank: RankState) -> World:
    return replace(world, me, rank._replace(wave=on_failed(rank.wave, rank.wave.stamp).wave, ballot=None, result=None))


def tell(world: World, me: int, rank: RankState, newer: int) -> World:
    step = (on_returned if world.returns[newer] else on_told)(rank.wave, stamp(newer))
    if step.wave.stamp == rank.wave.stamp:
        return replace(world, me, rank._replace(wave=step.wave))  # voting for the switch, in whatever round it is in
    in_flight = rank.ballot is not None or rank.result is not None
    goes_on_in_it = world.returns[newer] and wires(world, newer) == wires(world, index(rank.wave)) and step.wave.phase is Phase.RESTING
    assert not (in_flight and (step.wave.kept or goes_on_in_it)), f"a group is kept with a round in flight: {rank.wave} {step.wave}"
    told = replace(world, me, rank._replace(wave=step.wave, ballot=None, result=None))
    group = told.decided[newer]
    if all(told.ranks[member].is_alive and told.ranks[member].wave.stamp == stamp(newer) for member in group):
        told = told._replace(formed=(*told.formed[:newer], True, *told.formed[newer + 1 :]))
    return told


def form(world: World, me: int, rank: RankState) -> World:
    here = index(rank.wave)
    return replace(world, me, rank._replace(wave=on_group(rank.wave, stamp(here), world.decided[here]).wave))


def is_formed(world: World, wave: Wave) -> bool:
    return index(wave) >= 0 and world.formed[index(wave)]


def is_deserted(world: World, wave: Wave) -> bool:
    """Whether a member is gone from the group, so that its collectives fail."""
    return any(not _holds(world, world.ranks[member], wave) for member in world.decided[index(wave)])


def _holds(world: World, peer: RankState, wave: Wave) -> bool:
    """Whether a member has the group of this wave's epoch: as the live one, as the standby one, or as the kept one."""
    on = wires(world, index(wave))
    if not peer.is_alive:
        return False
    if peer.wave.standby is not None and peer.wave.standby.stamp == stamp(on):
        return True
    if peer.wave.kept and wires(world, world.before[index(peer.wave)]) == on:
        return True
    return index(peer.wave) >= 0 and wires(world, index(peer.wave)) == on and peer.wave.phase is not Phase.BROKEN


# -- the way to rest ------------------------------------------------------------------------------------------------------------


def next_towards_rest(world: World) -> Move | None:
    """One move of a world where nothing new is asked: only peers that own a wake-up wake, and the controller mends; None at rest."""
    if world.standby >= 0 and not world.is_gone_for:
        return "undone", undone(world)
    for me, rank in enumerate(world.ranks):
        if rank.is_alive:
            for move in (*_told(world, me, rank), *_own_moves(world, me, rank), *_standby_moves(world, me, rank)):
                if move[1] != world:
                    return move
    for move in _owned_wakes(world):
        return move
    members = world.decided[world.newest]
    group = tuple(member for member in members if world.ranks[member].is_alive)
    if group and (group != members or any(world.ranks[member].wave.phase is Phase.BROKEN for member in group)):
        return "mended", decide(world, group)
    return None


def _owned_wakes(world: World) -> Iterator[Move]:
    owners = [rank.wave for rank in world.ranks if rank.is_alive and rank.wave.owns_wake]
    for me, rank in enumerate(world.ranks):
        for wave in owners:
            taken = on_wake(rank.wave, wave.stamp, wave.wave).wave
            if rank.is_alive and taken != rank.wave:
                yield "woken by a peer", replace(world, me, rank._replace(wave=taken))


def why_not_rested(world: World) -> str | None:
    """What is wrong with a world that does not move any more."""
    members = [world.ranks[member] for member in world.decided[world.newest] if world.ranks[member].is_alive]
    if any(rank.wave.standby is not None or rank.wave.is_confirming for rank in members):
        return "a member has not come to the end of a switch"
    if any(rank.can_work for rank in members):
        return "a rank has work and nothing happens"
    if any(rank.wave.phase is not Phase.RESTING for rank in members):
        return "nobody has work and a member does not rest"
    if len({(rank.wave.stamp, rank.wave.wave) for rank in members}) > 1:
        return "the members rest in different waves"
    return None
