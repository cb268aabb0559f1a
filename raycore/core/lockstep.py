"""One rank's part in a pool in lockstep: begins rounds, wakes peers, keeps the group; `raycore/waves.py` decides what happens when.

Used on the step thread only. It never blocks for longer than `_INLINE_WAIT_S`: a rank that waits for a slow peer goes on answering clients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np

from raycore import waves
from raycore.core.beats import Progress
from raycore.core.group_rack import GroupRack
from raycore.engine import Engine
from raycore.errors import ErrorRecord, LockstepError
from raycore.groups import Collective, GroupSet, Int64s
from raycore.ids import EngineId, GroupStamp, Rank
from raycore.membership import Endpoints, Membership
from raycore.messages import Wake, WaveReport
from raycore.waves import Phase, Wave, WaveError, WaveStep

_log = logging.getLogger(__name__)

_INLINE_WAIT_S = 0.002
"""A round is waited for so long at once; after that the engine core serves its sockets and is told of the end."""
_WAKE_AGAIN_S = 0.05
_WOKEN_WAKES_AFTER_S = 0.2
"""A rank that was woken itself begins to wake others after so long, in case whoever woke it is not heard."""


class Peers(Protocol):
    """Reaches the other members' engine cores; what is sent may be lost."""

    def set_peers(self, peers: dict[EngineId, Endpoints]) -> None:
        """These, and no others."""
        ...

    def send(self, wake: Wake) -> None:
        """Tell all of them; never blocks."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


class WaveCounters:
    """What this rank did; read by `status` and by tests."""

    def __init__(self) -> None:
        self.waves = 0
        self.rounds = 0
        self.steps = 0
        self.idle_steps = 0
        self.stale_wakes = 0
        self.sent_wakes = 0
        self.broken = 0


class _Round:
    """A round in flight; `is_over` is set from another thread."""

    __slots__ = ("began_s", "is_over", "is_watched", "values", "work")

    def __init__(self, work: Collective, values: Int64s, began_s: float) -> None:
        self.work = work
        self.values = values
        self.began_s = began_s
        self.is_watched = False
        self.is_over = False


class Lockstep:
    """Owns the wave state, the group and the round in flight."""

    def __init__(
        self,
        engine: Engine,
        engine_id: EngineId,
        peers: Peers,
        progress: Progress,
        *,
        collective_s: float,
        regroup_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.wave = Wave(Rank(engine_id.rank), sync_interval=engine.info.sync_interval)
        self.counters = WaveCounters()
        self.on_stamp: Callable[[GroupStamp], None] = lambda _stamp: None
        """Called when this rank is in a group and every member of it has made a round there, this one included; or is back in one."""
        self.wake_core: Callable[[], None] = lambda: None
        """Ends the engine core's wait from any thread."""
        self.paused_ranks = 0
        """As of the last round."""
        self._engine = engine
        self._id = engine_id
        self._rack = GroupRack(engine)
        self._peers = peers
        self._progress = progress
        self._collective_s = collective_s
        self._regroup_s = regroup_s
        self._clock = clock
        self._round: _Round | None = None
        self._wake_due_s = 0.0
        self._without_group_since_s: float | None = clock()
        self._failure = ""
        self._changes = 0
        self._report()

    # -- questions ----------------------------------------------------------------------------------------------------

    @property
    def is_stepping(self) -> bool:
        """Whether this rank is in a wave."""
        return self.wave.phase is Phase.STEPPING

    @property
    def wait_s(self) -> float | None:
        """How long the engine core may sleep for the waves' sake; None: as long as it likes."""
        if self._round is None or not self.wave.owns_wake:
            return None
        return max(0.0, self._wake_due_s - self._clock())

    def wants_turn(self, *, has_work: bool) -> bool:
        """Whether there is something to do at once."""
        if self._round is not None:
            return self._round.is_over
        return self.is_stepping or (self.wave.phase is Phase.RESTING and (has_work or bool(self.wave.votes)))

    def lost(self) -> ErrorRecord | None:
        """Why requests cannot be served here any more, once no new group has come for too long."""
        since_s = self._without_group_since_s
        if since_s is None or self._clock() - since_s < self._regroup_s:
            return None
        text = f"rank {self._id.rank} has had no process group for {self._regroup_s:g} s: {self._failure or 'none was formed'}"
        return ErrorRecord(LockstepError.__name__, text)

    # -- events -------------------------------------------------------------------------------------------------------

    def advance(self, *, has_work: bool, is_paused: bool) -> bool:
        """Go on as far as goes without a step; whether a step is due now (of work, or of a dummy batch)."""
        if has_work or self.wave.votes:
            self._apply(waves.on_work(self.wave))
        if self.wave.may_reduce and not self._begin_round(has_work=has_work, is_paused=is_paused):
            return False
        # once a turn: rounds that only wait for a vote follow on one another, and the vote comes in between
        if self._round is not None and not self._end_round(self._round):
            return False
        return self.wave.may_step

    def stepped(self, *, was_idle: bool) -> None:
        """The step that was due is done."""
        if was_idle:
            self.counters.idle_steps += 1
        else:
            self.counters.steps += 1
        self._apply(waves.on_step(self.wave))

    def take_wake(self, wake: Wake) -> None:
        """A peer or the coordinator says that a wave runs."""
        step = waves.on_wake(self.wave, wake.stamp, wake.wave)
        self.counters.stale_wakes += step.is_stale
        if step.wave.phase is Phase.BROKEN and self.wave.phase is not Phase.BROKEN:
            self.fail(self.wave.stamp, f"a peer is in wave {wake.wave} of {wake.stamp}, this rank in wave {self.wave.wave}")
            return
        self._apply(step)

    def take_membership(self, membership: Membership) -> None:
        """A newer membership: its groups replace those that are held, by vote where they stand by, unless they are the same."""
        others = {member.engine: member.endpoints for member in membership.members if member.engine != self._id}
        self._peers.set_peers(others if membership.has(self._id) else {})
        group = membership.group
        stamp = group.stamp if group is not None else GroupStamp(membership.epoch, membership.term)
        on = waves.on_returned if group is not None and group.goes_back else waves.on_told
        self._apply(on(self.wave, stamp))

    def take_group(self, groups: GroupSet, members: tuple[Rank, ...]) -> None:
        """The groups of a membership are formed."""
        step = waves.on_group(self.wave, groups.stamp, members)
        if step.is_stale:
            groups.close()
            return
        self._apply(step)
        self._rack.take(groups)
        self._without_group_since_s = None

    def take_standby(self, groups: GroupSet | None, stamp: GroupStamp, members: tuple[Rank, ...]) -> bool:
        """Groups are formed beside the live ones; None at a rank that will leave. False when a newer epoch overtook them."""
        try:
            step = waves.on_standby(self.wave, stamp, members)
        except WaveError as error:
            _log.error("rank %d: %s", self._id.rank, error)
            step = WaveStep(self.wave, is_stale=True)
        if step.is_stale:
            if groups is not None:
                groups.close()
            return False
        self._rack.stand_by(groups)
        self._apply(step)
        return True

    def drop_standby(self, stamp: GroupStamp) -> None:
        """The operation was undone; nothing where it is decided here, which is a newer epoch's to end."""
        if not self.wave.is_decided:
            self._apply(waves.on_dropped(self.wave, stamp))

    def abandon(self, groups: GroupSet | None, stamp: GroupStamp) -> None:
        """What was built for a standby could not be used, or was undone before it was handed over."""
        if groups is not None and not self._rack.holds(groups):
            groups.close()
            self._rack.drop_unused()
        self.drop_standby(stamp)

    def release(self, stamp: GroupStamp) -> None:
        """Every member has confirmed these groups: the ones before them go."""
        self._apply(waves.on_released(self.wave, stamp))
        if stamp == self.wave.stamp:
            self._rack.release()

    def fail(self, stamp: GroupStamp, reason: str) -> None:
        """A collective of this stamp failed here, or its group could not be formed."""
        step = waves.on_failed(self.wave, stamp)
        if step.is_stale:
            return
        _log.error("rank %d: lockstep in %s is broken: %s", self._id.rank, stamp, reason)
        self.counters.broken += 1
        self._failure = reason
        self._apply(step)

    def close(self) -> None:
        """Leave the group. Idempotent."""
        self._round = None
        self._rack.close()
        self._peers.close()

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _begin_round(self, *, has_work: bool, is_paused: bool) -> bool:
        columns = waves.ballot(self.wave, has_work=has_work, is_paused=is_paused)
        values = np.array(columns, dtype=np.int64)
        try:
            work = self._rack.rounds.begin_sum(values)
        except LockstepError as error:
            self.fail(self.wave.stamp, str(error))
            return False
        self._round = _Round(work, values, self._clock())
        self._apply(waves.on_reducing(self.wave))
        return True

    def _end_round(self, current: _Round) -> bool:
        """Take in the round in flight; False when it is not over, or when it failed."""
        try:
            if not self._is_over(current):
                self._while_waiting(current)
                return False
            said = waves.verdict(self.wave, current.values.tolist())
        except (LockstepError, WaveError) as error:
            self.fail(self.wave.stamp, str(error))
            return False
        self._round = None
        self.counters.rounds += 1
        self.paused_ranks = said.paused
        step = waves.on_reduced(self.wave, self.wave.stamp, said)
        self.counters.waves += step.has_ended
        self._apply(step)
        return True

    def _is_over(self, current: _Round) -> bool:
        if current.is_over:
            return current.work.wait(self._collective_s)
        if current.is_watched:
            return False
        if current.work.wait(_INLINE_WAIT_S):
            return True
        current.is_watched = True

        def on_end() -> None:
            current.is_over = True
            self.wake_core()

        current.work.notify(on_end)
        return False

    def _while_waiting(self, current: _Round) -> None:
        now_s = self._clock()
        if now_s - current.began_s > self._collective_s:
            msg = f"a round of wave {self.wave.wave} took longer than {self._collective_s:g} s: a peer does not take part"
            raise LockstepError(msg)
        if self.wave.owns_wake and now_s >= self._wake_due_s:
            self._send_wake(now_s)

    def _send_wake(self, now_s: float) -> None:
        self.counters.sent_wakes += 1
        self._wake_due_s = now_s + _WAKE_AGAIN_S
        self._peers.send(Wake(self.wave.stamp, self.wave.wave))

    # -- state --------------------------------------------------------------------------------------------------------

    def _apply(self, step: WaveStep) -> None:
        before, self.wave = self.wave, step.wave
        if before is step.wave:
            return
        self._rack.follow(before, step.wave)
        self._note_group(before, step.wave)
        if step.sends_wake:
            self._send_wake(self._clock())
        elif step.wave.owns_wake and not before.owns_wake:
            self._wake_due_s = self._clock() + _WOKEN_WAKES_AFTER_S
        if (before.stamp, before.phase, before.wave) != (step.wave.stamp, step.wave.phase, step.wave.wave):
            self._changes += 1
            self._report()
        is_confirmed = before.is_confirming and not step.wave.is_confirming and before.stamp == step.wave.stamp
        if is_confirmed or step.is_back:
            self.on_stamp(step.wave.stamp)

    def _note_group(self, before: Wave, after: Wave) -> None:
        """The round in flight in a group that was left is nobody's; how long there has been none decides what happens to requests."""
        if after.stamp != before.stamp or after.phase is Phase.BROKEN:
            self._round = None
        if after.phase in (Phase.RESTING, Phase.STEPPING):
            self._without_group_since_s = None
            self._failure = ""
        elif self._without_group_since_s is None:
            self._without_group_since_s = self._clock()

    def _report(self) -> None:
        wave = self.wave
        self._progress.set_wave(WaveReport(wave.stamp, wave.phase, wave.wave, self._changes, self._failure))
