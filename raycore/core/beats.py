"""The beat thread: says that the process lives and what its step thread is doing, also while a step takes long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from raycore.engine import EngineLoad
from raycore.ids import EngineId
from raycore.messages import Beat


class Doing(msgspec.Struct, frozen=True):
    """What the step thread is doing; replaced as a whole, so that the beat thread reads one consistent value."""

    activity: str
    since_s: float
    budget_s: float


class Progress:
    """Written by the step thread, read by the beat thread."""

    def __init__(self, default_budget_s: float) -> None:
        self.default_budget_s = default_budget_s
        self.doing: Doing | None = None
        self.steps = 0
        self.load = EngineLoad()

    def begin(self, activity: str, budget_s: float | None) -> None:
        """An activity starts; None is the pool's default budget."""
        self.doing = Doing(activity, time.monotonic(), self.default_budget_s if budget_s is None else budget_s)

    def end(self) -> None:
        """The activity is over."""
        self.steps += 1
        self.doing = None


class BeatThread:
    """Publishes a `Beat` every interval until stopped."""

    def __init__(self, engine: EngineId, progress: Progress, publish: Callable[[Beat], None], interval_s: float) -> None:
        self._engine = engine
        self._progress = progress
        self._publish = publish
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raycore-beats", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait for the thread; the sockets may be closed afterwards."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        seq = 0
        while not self._stopped.wait(self._interval_s):
            seq += 1
            self._publish(self._beat(seq))

    def _beat(self, seq: int) -> Beat:
        doing = self._progress.doing
        return Beat(
            engine=self._engine,
            seq=seq,
            step=self._progress.steps,
            activity=doing.activity if doing else "",
            busy_s=time.monotonic() - doing.since_s if doing else 0.0,
            budget_s=doing.budget_s if doing else 0.0,
            load=self._progress.load,
        )
