"""The beat thread: says that the process lives and what its step thread is doing, also while a step takes long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from raycore.engine import EngineLoad
from raycore.ids import EngineId
from raycore.messages import Beat, WaveReport


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
        self.is_sleeping = False
        self.is_paused = False
        self.memory: dict[str, int] = {}
        self.cache: dict[str, int | float] = {}
        self.wave: WaveReport | None = None
        """Where this rank is, in a pool in lockstep."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when something is worth a beat at once."""

    def set_wave(self, report: WaveReport) -> None:
        """The rank's wave changed."""
        self.wave = report
        self.on_change()

    def begin(self, activity: str, budget_s: float | None) -> None:
        """An activity starts; None is the pool's default budget."""
        self.doing = Doing(activity, time.monotonic(), self.default_budget_s if budget_s is None else budget_s)

    def end(self) -> None:
        """The activity is over."""
        self.steps += 1
        self.doing = None


_LOAD_INTERVAL_S = 0.1
"""A load that changed is told after so long at the latest."""


class BeatThread:
    """Publishes a `Beat` every interval until stopped; sooner when the load changed, and at once when a wave did."""

    def __init__(self, engine: EngineId, progress: Progress, publish: Callable[[Beat], None], interval_s: float) -> None:
        self._engine = engine
        self._progress = progress
        self._publish = publish
        self._interval_s = interval_s
        self._is_stopped = False
        self._news = threading.Event()
        progress.on_change = self._news.set
        self._thread = threading.Thread(target=self._run, name="raycore-beats", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait for the thread; the sockets may be closed afterwards."""
        self._is_stopped = True
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        seq = 0
        told_s, told_load = 0.0, self._progress.load
        while True:
            is_news = self._news.wait(min(self._interval_s, _LOAD_INTERVAL_S))
            if self._is_stopped:
                return
            self._news.clear()
            now_s, load = time.monotonic(), self._progress.load
            if is_news or load != told_load or now_s - told_s >= self._interval_s - _LOAD_INTERVAL_S / 2:
                seq += 1
                told_s, told_load = now_s, load
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
            is_sleeping=self._progress.is_sleeping,
            memory=self._progress.memory,
            cache=self._progress.cache,
            wave=self._progress.wave,
            is_paused=self._progress.is_paused,
        )
