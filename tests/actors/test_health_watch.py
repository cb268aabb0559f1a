"""The health watch over fake subscriptions: who hangs, and who is forgiven because the watcher itself was held up."""

from __future__ import annotations

import asyncio

import pytest

from actors import health_watch
from actors.health_watch import HealthWatch
from raycore.config import HealthConfig
from raycore.engine import EngineLoad
from raycore.health import Verdict
from raycore.ids import EngineId
from raycore.membership import Member
from raycore.messages import Beat
from tests.actors.test_roster import member


class Subscription:
    """Gives out what the test puts in."""

    def __init__(self, member: Member) -> None:
        self.engine = member.engine
        self.beats: list[Beat] = []
        self.is_closed = False

    def drain(self) -> list[Beat]:
        beats, self.beats = self.beats, []
        return beats

    def close(self) -> None:
        self.is_closed = True


class Bench:
    """A watch, its subscriptions and its clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.made: list[Subscription] = []
        self.suspects: list[tuple[EngineId, str]] = []
        monkeypatch.setattr(health_watch, "BeatSubscriber", self._subscribe)
        config = HealthConfig(beat_interval_s=0.5, hang_after_s=2.0, first_beat_s=6.0)
        self.watch = HealthWatch(config, ("public", "secret"), self._suspect, clock=lambda: self.now_s)
        self.watch.watch(member(0))

    def _subscribe(self, endpoints: object, **_: object) -> Subscription:
        del endpoints
        self.made.append(Subscription(member(0)))
        return self.made[-1]

    def _suspect(self, engine: EngineId, cause: str) -> None:
        self.suspects.append((engine, cause))

    def beat(self, seq: int, **facts: object) -> None:
        values: dict[str, object] = {"step": seq, "activity": "", "busy_s": 0.0, "budget_s": 1.0, "load": EngineLoad(), **facts}
        self.made[0].beats.append(Beat(engine=member(0).engine, seq=seq, **values))  # type: ignore[arg-type]

    def tick(self, passed_s: float = 0.5) -> None:
        self.now_s += passed_s
        self.watch.look(self.now_s, stalled_s=passed_s - 0.5)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_silence_is_a_hang_and_is_told_once(bench: Bench) -> None:
    bench.beat(1)
    for _ in range(10):
        bench.tick()
    assert [engine for engine, _ in bench.suspects] == [member(0).engine]
    assert "no beat for 2.5 s" in bench.suspects[0][1]
    assert bench.made[0].is_closed


def test_the_first_beat_may_take_longer(bench: Bench) -> None:
    for _ in range(10):
        bench.tick()
    assert bench.suspects == []
    assert bench.watch.verdict(member(0).engine) is Verdict.ALIVE


def test_a_step_over_its_budget_is_a_hang(bench: Bench) -> None:
    bench.beat(1, activity="step", busy_s=5.0, budget_s=1.0)
    bench.tick()
    assert "over its budget" in bench.suspects[0][1]


def test_a_watcher_that_was_held_up_blames_nobody(bench: Bench) -> None:
    bench.beat(1)
    bench.tick()
    bench.tick(passed_s=60.0)
    assert bench.suspects == []
    for _ in range(5):
        bench.tick()
    assert len(bench.suspects) == 1


def test_what_is_forgotten_is_not_judged(bench: Bench) -> None:
    bench.watch.forget(member(0).engine)
    bench.tick(passed_s=60.0)
    assert bench.suspects == []
    assert bench.watch.last_beat(member(0).engine) is None


async def test_the_loop_ends_when_it_is_cancelled(bench: Bench) -> None:
    task = asyncio.create_task(bench.watch.run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
