"""The client's own look at its engines' beats, for when nobody else tells it of a hang."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raycore.config import HealthConfig
from raycore.health import EngineHealth, HealthLimits, Verdict, explain, judge, observe
from raycore.ids import EngineId
from raycore.transport.beats import BeatSubscriber

_LATE_TICK_S = 1.0
"""A tick this late means that this process was frozen, not its engines."""


class BeatWatch:
    """Reads the beats of every engine that the client has a session with, and reports changes of verdict."""

    def __init__(self, config: HealthConfig, on_verdict: Callable[[EngineId, Verdict, str], None]) -> None:
        self._config = config
        self._limits = HealthLimits(config.hang_after_s, config.first_beat_s, config.grace_s)
        self._on_verdict = on_verdict
        self._subscribers: dict[EngineId, BeatSubscriber] = {}
        self._health: dict[EngineId, EngineHealth] = {}
        self._verdicts: dict[EngineId, Verdict] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, every beat interval."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="raycore-beat-watch")

    def watch(self, engine: EngineId, subscriber: BeatSubscriber) -> None:
        """Look at this engine too."""
        self._subscribers[engine] = subscriber
        self._health[engine] = EngineHealth(asyncio.get_running_loop().time())
        self._verdicts[engine] = Verdict.ALIVE

    def forget(self, engine: EngineId) -> None:
        """The engine is dead or left."""
        subscriber = self._subscribers.pop(engine, None)
        if subscriber is not None:
            subscriber.close()
            del self._health[engine], self._verdicts[engine]

    async def close(self) -> None:
        """Stop looking and release the sockets."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for engine in list(self._subscribers):
            self.forget(engine)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        interval_s = self._config.beat_interval_s
        due_s = loop.time() + interval_s
        while True:
            await asyncio.sleep(interval_s)
            now_s = loop.time()
            if now_s - due_s > _LATE_TICK_S:
                self._forgive(now_s)
            due_s = now_s + interval_s
            for engine in list(self._subscribers):
                self._look(engine, now_s)

    def _look(self, engine: EngineId, now_s: float) -> None:
        health = self._health[engine]
        for beat in self._subscribers[engine].drain():
            if beat.engine == engine:
                health = observe(health, beat, now_s)
        self._health[engine] = health
        verdict = judge(health, now_s, self._limits)
        if verdict is not self._verdicts[engine]:
            self._verdicts[engine] = verdict
            self._on_verdict(engine, verdict, explain(health, verdict, now_s))

    def _forgive(self, now_s: float) -> None:
        """This process slept: silence until now says nothing."""
        for engine, health in self._health.items():
            self._health[engine] = EngineHealth(now_s, None if health.last_beat_s is None else now_s, health.beat)
