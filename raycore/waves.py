"""Waves of ranks in lockstep: when a rank starts one, takes part in a round, steps, and rests. Pure: events in, new state and commands out.

OUT      ── group of a newer stamp ──▶ RESTING in wave 0
RESTING  ── work here ──▶ STEPPING, and wake the others
RESTING  ── Wake of this wave ──▶ STEPPING
RESTING  ── Wake of a later wave ──▶ BROKEN                 the others ended a wave that this rank never saw end
STEPPING ── round: goes on ──▶ STEPPING, steps due
STEPPING ── round: nobody has work ──▶ RESTING in the next wave (or STEPPING in it, if a peer is there already)
STEPPING ── Wake of the next wave ──▶ STEPPING, remembered
OUT, STEPPING ── forming, or a collective, failed ──▶ BROKEN                    the step in flight is dropped; undone by a new group only
any      ── told of a newer stamp ──▶ OUT                   until its group is formed
any      ── anything of an older stamp ──▶ unchanged

With a standby group, formed beside the one that is held (`docs/scaling.md`):
any      ── standby formed ──▶ the same, prepared           undone by `on_dropped`, while it is not decided
RESTING, STEPPING ── told of the standby's stamp ──▶ STEPPING, voting for the switch
OUT, BROKEN ── told of the standby's stamp ──▶ RESTING in it: no group is held whose members would have to agree
STEPPING ── round: all vote for the switch ──▶ RESTING in wave 0 of the standby's stamp, the old group kept
voting   ── a collective failed ──▶ RESTING in the standby's stamp, nothing kept
kept     ── told that a joiner was lost ──▶ RESTING in wave 0 of that stamp, in the kept group
voting   ── told that a joiner was lost ──▶ votes on, and goes back at the switch: all leave the old group at one round or none does
kept     ── every member has confirmed ──▶ the same, nothing kept
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from raycore.ids import GroupStamp, Rank

_ROUND_BITS = 24
VOTE_SLOTS = 4
"""Votes that can be open at one time; a slot's meaning is its owner's."""


class Phase(enum.IntEnum):
    """What a rank does; in this order in its reports."""

    OUT = 0
    """No process group: not a member, or the group is being formed."""
    RESTING = 1
    STEPPING = 2
    BROKEN = 3
    """The group failed here; nothing steps until there is a new one."""


class Vote(enum.IntEnum):
    """The slots' meanings."""

    SWITCH = 0
    """The standby group is decided: go over to it after this round."""
    CONFIRM = 1
    """This rank is in the group that was switched to."""


class Column(enum.IntEnum):
    """What the numbers of a round mean; the votes follow."""

    WORK = 0
    PAUSED = 1
    POSITION = 2


ROUND_WIDTH = len(Column) + VOTE_SLOTS


class WaveError(Exception):
    """An event that cannot come in this state; nothing was changed."""


class Standby(msgspec.Struct, frozen=True):
    """A group that is formed beside the one that is held; a rank that will leave is not among its members."""

    stamp: GroupStamp
    members: tuple[Rank, ...]


class Wave(msgspec.Struct, frozen=True):
    """One rank's part in waves. `wave`: the one that runs, or that would be next; `round`: its completed rounds."""

    me: Rank
    stamp: GroupStamp = GroupStamp()
    members: tuple[Rank, ...] = ()
    phase: Phase = Phase.OUT
    wave: int = 0
    round: int = 0
    is_reducing: bool = False
    """A round is in flight here."""
    steps_due: int = 0
    """Steps until the next round."""
    wanted: int = -1
    """The newest wave that a peer is known to be in."""
    sync_interval: int = 1
    standby: Standby | None = None
    is_decided: bool = False
    """The standby group is decided: this rank votes for the switch."""
    is_confirming: bool = False
    """The switch is made here; the first round in the new group is not complete."""
    kept: tuple[Rank, ...] = ()
    """Members of the group that was left at the switch and can be gone back to."""
    back: GroupStamp | None = None
    """Go back to the kept group, under this stamp, as soon as the switch is made."""

    @property
    def votes(self) -> tuple[Vote, ...]:
        """Where this rank says yes in its next round."""
        return (*((Vote.SWITCH,) if self.is_decided else ()), *((Vote.CONFIRM,) if self.is_confirming else ()))

    @property
    def owns_wake(self) -> bool:
        """Whether this rank must repeat the wake-up: the wave's first round is not complete here."""
        return self.phase is Phase.STEPPING and self.round == 0

    @property
    def may_reduce(self) -> bool:
        """Whether the next thing to do is to begin a round."""
        return self.phase is Phase.STEPPING and not self.is_reducing and self.steps_due == 0

    @property
    def may_step(self) -> bool:
        """Whether the next thing to do is a step, of work or of a dummy batch."""
        return self.phase is Phase.STEPPING and self.steps_due > 0


class WaveStep(msgspec.Struct, frozen=True):
    """What follows from an event: the new state, and what the engine core must do."""

    wave: Wave
    sends_wake: bool = False
    """Send Wake(stamp, wave) to every other member now."""
    is_stale: bool = False
    """The event was of another stamp or of a wave that is over; it changed nothing."""
    has_ended: bool = False
    """A wave ended here."""
    is_back: bool = False
    """This rank is in the group again that it had kept, or was to leave."""


def on_told(wave: Wave, stamp: GroupStamp) -> WaveStep:
    """A newer topology was decided: the old group is left, whatever it was doing; or, where its group stands by, to be left by vote."""
    if stamp <= wave.stamp:
        return WaveStep(wave, is_stale=True)
    if wave.standby is not None and stamp == wave.standby.stamp:
        return _decided(wave)
    stays = wave.standby if wave.standby is not None and stamp < wave.standby.stamp else None  # told late, of what came before it
    return WaveStep(Wave(wave.me, stamp, sync_interval=wave.sync_interval, standby=stays))


def on_group(wave: Wave, stamp: GroupStamp, members: Sequence[Rank]) -> WaveStep:
    """The group of this stamp is formed. WaveError when this rank is not in it."""
    if stamp < wave.stamp or (stamp == wave.stamp and wave.phase is not Phase.OUT):
        return WaveStep(wave, is_stale=True)
    if wave.me not in members:
        msg = f"rank {wave.me} is not in the group of {stamp}: {tuple(members)}"
        raise WaveError(msg)
    return WaveStep(Wave(wave.me, stamp, tuple(members), Phase.RESTING, sync_interval=wave.sync_interval))


def on_standby(wave: Wave, stamp: GroupStamp, members: Sequence[Rank]) -> WaveStep:
    """A group is formed beside the one that is held; it replaces an earlier standby. WaveError when one is decided already."""
    if stamp <= wave.stamp:
        return WaveStep(wave, is_stale=True)
    if wave.is_decided:
        msg = f"rank {wave.me} is to switch to {wave.standby}; {stamp} cannot stand by"
        raise WaveError(msg)
    return WaveStep(msgspec.structs.replace(wave, standby=Standby(stamp, tuple(members))))


def on_dropped(wave: Wave, stamp: GroupStamp) -> WaveStep:
    """The operation of this standby group was undone. WaveError when it is decided."""
    if wave.standby is None or wave.standby.stamp != stamp:
        return WaveStep(wave, is_stale=True)
    if wave.is_decided:
        msg = f"the switch of rank {wave.me} to {stamp} is decided and cannot be undone"
        raise WaveError(msg)
    return WaveStep(msgspec.structs.replace(wave, standby=None))


def on_returned(wave: Wave, stamp: GroupStamp) -> WaveStep:
    """A joiner was lost before all had confirmed: the next epoch is the old members, in their old group, from its wave 0 on.

    A rank that has not switched votes for it all the same, for all ranks must leave the old group's numbering at one round.
    """
    if stamp <= wave.stamp:
        return WaveStep(wave, is_stale=True)
    if wave.kept:
        return WaveStep(_fresh(wave, stamp, wave.kept), is_back=True)
    if wave.standby is not None and wave.phase in (Phase.RESTING, Phase.STEPPING):
        step = _decided(wave)
        return WaveStep(msgspec.structs.replace(step.wave, back=stamp), sends_wake=step.sends_wake)
    return WaveStep(Wave(wave.me, stamp, phase=Phase.BROKEN, sync_interval=wave.sync_interval))


def on_released(wave: Wave, stamp: GroupStamp) -> WaveStep:
    """Every member has confirmed the group of this stamp: there is no way back any more."""
    if stamp != wave.stamp or not wave.kept:
        return WaveStep(wave, is_stale=True)
    return WaveStep(msgspec.structs.replace(wave, kept=()))


def on_work(wave: Wave) -> WaveStep:
    """This rank has work that it may do now, or says yes in a vote; however old the news of it, the wave that is due is started."""
    if wave.phase is not Phase.RESTING:
        return WaveStep(wave)
    return WaveStep(_started(wave), sends_wake=True)


def on_wake(wave: Wave, stamp: GroupStamp, number: int) -> WaveStep:
    """A peer or the coordinator says that a member is in wave `number`."""
    if stamp != wave.stamp or wave.phase in (Phase.OUT, Phase.BROKEN) or number < wave.wave:
        return WaveStep(wave, is_stale=True)
    if wave.phase is Phase.RESTING:
        if number == wave.wave:
            return WaveStep(_started(wave))
        return WaveStep(_broken(wave))
    if number == wave.wave:
        return WaveStep(wave)
    if number == wave.wave + 1:
        return WaveStep(msgspec.structs.replace(wave, wanted=number))
    return WaveStep(_broken(wave))


def on_reducing(wave: Wave) -> WaveStep:
    """This rank began a round. WaveError when none is due."""
    if not wave.may_reduce:
        msg = f"no round is due: {wave}"
        raise WaveError(msg)
    return WaveStep(msgspec.structs.replace(wave, is_reducing=True))


def on_reduced(wave: Wave, stamp: GroupStamp, said: Verdict) -> WaveStep:
    """The round in flight is complete, and its sums say so. WaveError when none was in flight."""
    if stamp != wave.stamp or wave.phase is not Phase.STEPPING:
        return WaveStep(wave, is_stale=True)
    if not wave.is_reducing:
        msg = f"no round is in flight: {wave}"
        raise WaveError(msg)
    if Vote.CONFIRM in said.carried:
        wave = msgspec.structs.replace(wave, is_confirming=False)
    if Vote.SWITCH in said.carried:
        return WaveStep(_switched(wave, keeps=True), is_back=wave.back is not None)
    if said.goes_on:
        steps = wave.sync_interval if said.has_work else 0
        return WaveStep(msgspec.structs.replace(wave, round=wave.round + 1, is_reducing=False, steps_due=steps))
    rests = msgspec.structs.replace(wave, phase=Phase.RESTING, wave=wave.wave + 1, round=0, is_reducing=False, wanted=-1)
    return WaveStep(_started(rests) if wave.wanted == rests.wave else rests, has_ended=True)


def on_step(wave: Wave) -> WaveStep:
    """A step was done. WaveError when none was due."""
    if not wave.may_step:
        msg = f"no step is due: {wave}"
        raise WaveError(msg)
    return WaveStep(msgspec.structs.replace(wave, steps_due=wave.steps_due - 1))


def on_failed(wave: Wave, stamp: GroupStamp) -> WaveStep:
    """A collective of this group failed or took too long, or the group could not be formed."""
    if stamp != wave.stamp:
        return WaveStep(wave, is_stale=True)
    return WaveStep(_switched(wave, keeps=False) if wave.is_decided else _broken(wave))


def ballot(wave: Wave, *, has_work: bool, is_paused: bool) -> list[int]:
    """What this rank puts into the round: `ROUND_WIDTH` integers."""
    columns = [0] * ROUND_WIDTH
    columns[Column.WORK] = int(has_work)
    columns[Column.PAUSED] = int(is_paused)
    columns[Column.POSITION] = position(wave)
    for slot in wave.votes:
        columns[len(Column) + slot] = 1
    return columns


def position(wave: Wave) -> int:
    """Where a rank is, as one number that is equal on all ranks of a round."""
    return (wave.wave << _ROUND_BITS) + wave.round


class Verdict(msgspec.Struct, frozen=True):
    """What the sums of a round say, the same on every rank."""

    goes_on: bool
    has_work: bool
    """Somebody has work: steps follow. A wave that goes on for a vote alone only has its rounds."""
    paused: int
    """Ranks that are paused."""
    carried: tuple[int, ...]
    """Vote slots in which every rank said yes."""


def verdict(wave: Wave, sums: Sequence[int]) -> Verdict:
    """Read the sums. WaveError when the ranks were not in the same round."""
    size = len(wave.members)
    if sums[Column.POSITION] != size * position(wave):
        msg = f"the ranks are not in the same round: rank {wave.me} is in wave {wave.wave}, round {wave.round}"
        raise WaveError(msg)
    votes = sums[len(Column) :]
    is_open = any(0 < count < size for count in votes)
    carried = tuple(slot for slot, count in enumerate(votes) if count == size)
    has_work = sums[Column.WORK] > 0
    return Verdict(has_work or is_open, has_work, sums[Column.PAUSED], carried)


def _decided(wave: Wave) -> WaveStep:
    """Vote for the switch; at once where no group is held."""
    if wave.phase in (Phase.OUT, Phase.BROKEN):
        return WaveStep(_switched(wave, keeps=False))
    decided = msgspec.structs.replace(wave, is_decided=True)
    return WaveStep(_started(decided), sends_wake=True) if wave.phase is Phase.RESTING else WaveStep(decided)


def _switched(wave: Wave, *, keeps: bool) -> Wave:
    assert wave.standby is not None  # noqa: S101 -- only a formed group can be decided
    if wave.back is not None:
        if keeps:
            return _fresh(wave, wave.back, wave.members)
        return Wave(wave.me, wave.back, phase=Phase.BROKEN, sync_interval=wave.sync_interval)
    stamp, members = wave.standby.stamp, wave.standby.members
    if wave.me not in members:
        return Wave(wave.me, stamp, sync_interval=wave.sync_interval)
    fresh = _fresh(wave, stamp, members)
    return msgspec.structs.replace(fresh, is_confirming=True, kept=wave.members if keeps else ())


def _fresh(wave: Wave, stamp: GroupStamp, members: tuple[Rank, ...]) -> Wave:
    return Wave(wave.me, stamp, members, Phase.RESTING, sync_interval=wave.sync_interval)


def _started(wave: Wave) -> Wave:
    return msgspec.structs.replace(wave, phase=Phase.STEPPING, round=0, is_reducing=False, steps_due=0, wanted=-1)


def _broken(wave: Wave) -> Wave:
    return msgspec.structs.replace(wave, phase=Phase.BROKEN, is_reducing=False, steps_due=0, wanted=-1)
