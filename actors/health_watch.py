"""Listens to the beats of a pool's engines and says which are suspect."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from raycore.config import HealthConfig
from raycore.health import EngineHealth, HealthLimits, Verdict, explain, judge, observe
from raycore.ids import EngineId
from raycore.membership import Member
from raycore.messages import Beat
from raycore.transport.beats import BeatSubscriber
from raycore.transport.endpoints import this_host

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Watched:
    subscriber: BeatSubscriber
    state: EngineHealth


class HealthWatch:
    """One subscription per engine core; `on_suspect` is called once for each that hangs."""

    def __init__(
        self,
        config: HealthConfig,
        keys: tuple[str, str],
        on_suspect: Callable[[EngineId, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._interval_s = config.beat_interval_s
        self._limits = HealthLimits(hang_after_s=config.hang_after_s, first_beat_s=config.first_beat_s, grace_s=config.grace_s)
        self._keys = keys
        self._on_suspect = on_suspect
        self._engines: dict[EngineId, _Watched] = {}

    def watch(self, member: Member) -> None:
        """Begin to listen."""
        use_tcp = member.endpoints.host != this_host()
        subscriber = BeatSubscriber(member.endpoints, use_tcp=use_tcp, client_public_key=self._keys[0], client_secret_key=self._keys[1])
        self._engines[member.engine] = _Watched(subscriber, EngineHealth(watched_since_s=self._clock()))

    def forget(self, engine: EngineId) -> None:
        """Stop listening; unknown engines are fine."""
        watched = self._engines.pop(engine, None)
        if watched is not None:
            watched.subscriber.close()

    def last_beat(self, engine: EngineId) -> Beat | None:
        """The newest beat heard."""
        watched = self._engines.get(engine)
        return None if watched is None else watched.state.beat

    def verdict(self, engine: EngineId) -> Verdict:
        """What the beats say now; ALIVE for an engine that is not watched."""
        watched = self._engines.get(engine)
        return Verdict.ALIVE if watched is None else judge(watched.state, self._clock(), self._limits)

    async def run(self) -> None:
        """Read and judge, once per beat interval, until cancelled."""
        last_s = self._clock()
        while True:
            await asyncio.sleep(self._interval_s)
            now_s = self._clock()
            stalled_s, last_s = now_s - last_s - self._interval_s, now_s
            self.look(now_s, stalled_s)

    def look(self, now_s: float, stalled_s: float) -> None:
        """Read and judge once; `stalled_s`: how much later than planned this process gets to it."""
        for engine in list(self._engines):
            self._look(engine, now_s, stalled_s)

    def close(self) -> None:
        """Drop all subscriptions."""
        for engine in list(self._engines):
            self.forget(engine)

    def _look(self, engine: EngineId, now_s: float, stalled_s: float) -> None:
        watched = self._engines[engine]
        for beat in watched.subscriber.drain():
            watched.state = observe(watched.state, beat, now_s)
        if stalled_s > self._interval_s:
            # This process was held up, so the silence may be its own: the engines get that time back.
            watched.state = _forgive(watched.state, stalled_s)
        verdict = judge(watched.state, now_s, self._limits)
        if verdict is not Verdict.ALIVE:
            cause = explain(watched.state, verdict, now_s)
            self.forget(engine)
            self._on_suspect(engine, cause)


def _forgive(state: EngineHealth, stalled_s: float) -> EngineHealth:
    last_beat_s = None if state.last_beat_s is None else state.last_beat_s + stalled_s
    return EngineHealth(watched_since_s=state.watched_since_s + stalled_s, last_beat_s=last_beat_s, beat=state.beat)
