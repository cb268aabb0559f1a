"""Whether one engine core sleeps: a pause, and at levels 1 and 2 an engine that has given memory back.

awake ── sleep(level), once paused ──▶ asleep ── wake_up(some) ──▶ asleep ── wake_up(the rest) ──▶ awake; resumed where the sleep paused
"""

from __future__ import annotations

from collections.abc import Sequence

from raycore.engine import Engine
from raycore.errors import EngineStateError, NotSupportedError

ONLY_PAUSED = 0


class SleepKeeper:
    """Owns the level of one engine's sleep; the engine's part is its utilities `sleep` and `wake_up`, called while it is paused."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._level: int | None = None
        self.resumes = False
        """Whether the pause belongs to the sleep, and ends with it."""

    @property
    def is_sleeping(self) -> bool:
        """Whether `wake_up` has to come before anything is computed."""
        return self._level is not None

    def check_sleep(self, level: int) -> None:
        """EngineStateError or NotSupportedError before anything is paused for it."""
        if self._level is not None:
            raise EngineStateError(f"the engine sleeps already, at level {self._level}: call wake_up before another sleep")
        if level != ONLY_PAUSED and "sleep" not in self._engine.utilities():
            msg = f"sleep at level {level} is not supported by the engine {self._engine.info.engine!r}; level 0 only pauses"
            raise NotSupportedError(msg, method="sleep")

    def fall_asleep(self, level: int, *, resumes: bool) -> None:
        """The pause is complete. What the engine raises leaves it awake."""
        self.check_sleep(level)
        if level != ONLY_PAUSED:
            self._engine.utilities()["sleep"](level=level)
        self._level, self.resumes = level, resumes

    def wake_up(self, tags: Sequence[str] | None) -> bool:
        """Bring these parts back; whether the engine is awake. What the engine raises leaves it asleep."""
        if self._level is None and "wake_up" not in self._engine.utilities():
            raise EngineStateError("the engine is awake: there is nothing to wake up")
        is_awake = True if self._level == ONLY_PAUSED else self._engine.utilities()["wake_up"](tags=tags)
        if is_awake:
            self._level = None
        return is_awake

    def check_awake(self, what: str) -> None:
        """EngineStateError that names `what` while the engine sleeps."""
        if self._level is not None:
            raise EngineStateError(f"{what} while the engine sleeps: call wake_up, which also resumes what the sleep paused")
