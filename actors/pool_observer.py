"""What a pool's controller tells of it: an event for each change, gauges and loads once a second. It decides nothing."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, final
from urllib.parse import urlsplit

import msgspec

from elastic.operation import Operation, Phase
from raycore import metrics
from raycore.event_log import EventLog
from raycore.events import Began, Died, Ended, Event, LoadSeen, PhaseBegan, RankState, Stamp, membership_events
from raycore.ids import EngineId
from raycore.membership import Member, Membership, MemberState
from raycore.messages import Beat
from raycore.metrics import Metric, MetricsSink

LOOK_S = 1.0
"""A load that changed is an event, and every gauge is set, this often; Ray forgets a gauge that is not set for two of its reports."""


class PoolView(msgspec.Struct, frozen=True):
    """What the controller knows at one moment. `target`: ranks that the running operation leads to, or that were asked for last."""

    membership: Membership
    target: int
    standbys: int
    beats: Mapping[EngineId, Beat]


class Observer(Protocol):
    """Who is told what happens to a pool."""

    def began(self, term: int, *, recovered: bool) -> None:
        """The pool is up under this controller."""
        ...

    def on_membership(self, before: Membership, after: Membership) -> None:
        """A decision was made."""
        ...

    def on_operation(self, before: Operation | None, after: Operation) -> None:
        """The running scaling operation moved."""
        ...

    async def run(self, look: Callable[[], PoolView]) -> None:
        """Tell of loads and sizes until cancelled."""
        ...

    def ended(self) -> None:
        """Nothing is left of the pool."""
        ...


@final
class NobodyWatches:
    """Tells nobody."""

    def began(self, term: int, *, recovered: bool) -> None:
        """The pool is up."""

    def on_membership(self, before: Membership, after: Membership) -> None:
        """A decision was made."""

    def on_operation(self, before: Operation | None, after: Operation) -> None:
        """The running operation moved."""

    async def run(self, look: Callable[[], PoolView]) -> None:
        """Nothing to look at."""

    def ended(self) -> None:
        """The pool has ended."""


@final
class PoolObserver:
    """Writes to the event log and to the metrics, either of which may be missing."""

    def __init__(
        self,
        stamp: Stamp,
        *,
        engine: str,
        model: str,
        node_ip: str,
        sink: MetricsSink | None,
        log: EventLog | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stamp = stamp
        self._engine = engine
        self._model = model
        self._node_ip = node_ip
        self._sink = sink
        self._log = log
        self._clock = clock
        self._states: dict[EngineId, tuple[bool, bool]] = {}
        self._loads: dict[int, tuple[int, int, float]] = {}

    def began(self, term: int, *, recovered: bool) -> None:
        """The pool is up under this controller."""
        self._write(Began(**self._facts(), engine=self._engine, model=self._model, term=term, recovered=recovered))

    def on_membership(self, before: Membership, after: Membership) -> None:
        """Who joined, left and died, and the epoch."""
        ips = {int(member.engine.rank): self._ip_of(member) for member in after.members}
        for event in membership_events(before, after, self._clock(), self._stamp, ips):
            self._write(event)
            if isinstance(event, Died):
                self._record(metrics.ENGINE_DEATHS, 1, cause=event.kind, dp_rank=str(event.rank))

    def on_operation(self, before: Operation | None, after: Operation) -> None:
        """The phases that the operation entered since, and how long those before them took."""
        if not after.goal.joining and not after.goal.leaving and before is None:
            return  # there was nothing to do, which may be asked for every second
        known = len(before.transitions) if before is not None and before.id == after.id else 0
        goal = after.goal
        leaving = tuple(int(engine.rank) for engine in goal.leaving)
        for step in after.transitions[known:]:
            is_failed = step.phase in {Phase.ROLLING_BACK, Phase.UNDONE}
            error = after.error if is_failed else ""
            self._write(
                PhaseBegan(
                    **self._facts(),
                    operation=after.id,
                    phase=str(step.phase),
                    target=goal.target,
                    joining=tuple(int(rank) for rank in goal.joining),
                    leaving=leaving,
                    error=error,
                )
            )
            if step.phase.is_end:
                self._record(metrics.SCALE_OPERATIONS, 1, outcome=str(step.phase))
        for last, entered in itertools.pairwise(after.transitions[max(0, known - 1) :]):
            self._record(metrics.SCALE_DURATION, entered.at_s - last.at_s, phase=str(last.phase))

    async def run(self, look: Callable[[], PoolView]) -> None:
        """Tell of loads, sizes, pauses and sleep, once a second, until cancelled."""
        while True:
            self.look(look())
            await asyncio.sleep(LOOK_S)

    def look(self, view: PoolView) -> None:
        """Tell of one moment."""
        members = view.membership.members
        serving = sum(member.state is MemberState.SERVING for member in members)
        for metric, value in (
            (metrics.DP_SIZE, serving),
            (metrics.DP_TARGET_SIZE, view.target or serving),
            (metrics.STANDBYS, view.standbys),
            (metrics.EPOCH, view.membership.epoch),
        ):
            self._record(metric, value)
        loads: dict[int, tuple[int, int, float]] = {}
        states: dict[EngineId, tuple[bool, bool]] = {}
        for member in members:
            beat = view.beats.get(member.engine)
            if beat is not None:
                loads[member.engine.rank] = self._tell_load(member, beat)
                states[member.engine] = self._tell_state(member.engine, beat)
        self._states = states
        if loads != self._loads:
            self._loads = loads
            self._write(LoadSeen(**self._facts(), ranks=loads))

    def _tell_load(self, member: Member, beat: Beat) -> tuple[int, int, float]:
        load, capacity = beat.load, member.info.kv_tokens
        usage = min(1.0, load.kv_tokens_used / capacity) if capacity else 0.0
        tags = {"dp_rank": str(member.engine.rank), "node_ip": self._ip_of(member)}
        for metric, value in (
            (metrics.REQUESTS_RUNNING, load.running),
            (metrics.REQUESTS_WAITING, load.waiting),
            (metrics.KV_CACHE_USAGE, usage),
            (metrics.IS_PAUSED, beat.is_paused),
            (metrics.IS_SLEEPING, beat.is_sleeping),
        ):
            self._record(metric, value, **tags)
        return load.running, load.waiting, round(usage, 3)

    def _tell_state(self, engine: EngineId, beat: Beat) -> tuple[bool, bool]:
        state = (beat.is_paused, beat.is_sleeping)
        if state != self._states.get(engine, (False, False)):
            self._write(RankState(**self._facts(), rank=engine.rank, is_paused=beat.is_paused, is_sleeping=beat.is_sleeping))
        return state

    def ended(self) -> None:
        """Nothing is left of the pool."""
        self._write(Ended(**self._facts()))
        if self._log is not None:
            self._log.close()

    def _ip_of(self, member: Member) -> str:
        """An engine that binds no TCP is on the controller's own host."""
        return urlsplit(member.endpoints.requests_tcp).hostname or self._node_ip

    def _facts(self) -> dict[str, Any]:
        return {"at_s": self._clock(), "pool": self._stamp.pool, "life": self._stamp.life}

    def _write(self, event: Event) -> None:
        if self._log is not None:
            self._log.append(event)

    def _record(self, metric: Metric, value: float, **tags: str) -> None:
        if self._sink is not None:
            self._sink.record(metric, float(value), tags)


def beats_of(membership: Membership, last_beat: Callable[[EngineId], Beat | None]) -> dict[EngineId, Beat]:
    """What members said last, of those that were heard."""
    found = ((member.engine, last_beat(member.engine)) for member in membership.members)
    return {engine: beat for engine, beat in found if beat is not None}
