"""The autoscaling loop beside a pool of its own making: what it begins, what it leaves, and what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from actors.autoscaling import Autoscaler, Autoscaling
from elastic.policies import Observation, Proposal
from raycore.client.control import ScalingReport
from raycore.errors import CapacityError, ConfigurationError


class FakePool:
    """Resizes when it is let."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ranks = 2
        self.requests = 0
        self.trouble = ""
        self.asked: list[int] = []
        self.may_end = asyncio.Event()
        self.error: Exception | None = None

    def observe(self) -> Observation | str:
        return self.trouble or Observation(at_s=self.now_s, ranks=self.ranks, running=self.requests)

    async def scale(self, target: int) -> ScalingReport:
        self.asked.append(target)
        await self.may_end.wait()
        if self.error is not None:
            raise self.error
        self.ranks = target
        return ScalingReport(operation="o", ranks=tuple(range(target)))


def settings(**values: Any) -> Autoscaling:
    options = {"requests_per_rank": 10, "grow_window_s": 5, "shrink_window_s": 10, "panic_window_s": 2}
    return Autoscaling.parse(
        {"options": options, "bounds": {"max_ranks": 8, "cool_down_s": 20}, "dry_run": False, "interval_s": 1e6, **values}
    )


async def scaler_of(pool: FakePool, **values: Any) -> Autoscaler:
    scaler = Autoscaler(pool.observe, pool.scale, lambda: pool.now_s)
    scaler.configure(settings(**values))
    return scaler


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_it_grows_once_and_holds_while_that_runs() -> None:
    pool = FakePool()
    scaler = await scaler_of(pool)
    pool.requests = 35
    for pool.now_s in range(5):
        scaler.look()
        await settle()
    assert pool.asked == [4]
    assert scaler.status()["is_resizing"]
    pool.may_end.set()
    await settle()
    scaler.look()
    assert (pool.asked, scaler.status()["is_resizing"], scaler.status()["decisions"][0]["outcome"]) == ([4], False, "done")
    scaler.close()


async def test_a_dry_run_says_and_does_nothing() -> None:
    pool = FakePool()
    scaler = await scaler_of(pool, dry_run=True)
    pool.requests = 35
    for pool.now_s in range(3):
        scaler.look()
    await settle()
    assert pool.asked == []
    assert [(row["target"], row["dry_run"]) for row in scaler.status()["decisions"]] == [(4, True)], "said once"
    assert scaler.status()["now"].startswith("2 → 4: work for 3.5 ranks")
    scaler.close()


async def test_without_data_nothing_is_decided() -> None:
    pool = FakePool()
    scaler = await scaler_of(pool)
    pool.requests, pool.trouble = 80, "ranks [1] have not been heard"
    assert scaler.look() is None
    assert scaler.status()["now"] == "holds: ranks [1] have not been heard"
    pool.trouble = ""
    decision = scaler.look()
    assert decision is not None
    assert decision.target == 4
    scaler.close()


async def test_after_a_failure_it_waits() -> None:
    pool = FakePool()
    scaler = await scaler_of(pool)
    pool.requests, pool.error = 35, CapacityError("no room for 2 more")
    pool.may_end.set()
    for pool.now_s in range(19):
        scaler.look()
        await settle()
    assert pool.asked == [4]
    assert scaler.status()["decisions"][0]["outcome"] == "CapacityError: no room for 2 more"
    assert "failed" in scaler.status()["now"]
    pool.now_s, pool.error = 25, None
    scaler.look()
    await settle()
    assert pool.asked == [4, 4]
    scaler.close()


class Broken:
    """A policy that fails."""

    window_s = 1.0

    def propose(self, window: Sequence[Observation]) -> Proposal:
        raise ZeroDivisionError(len(window))


async def test_a_policy_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pool = FakePool()
    scaler = await scaler_of(pool, policy=f"{__name__}:Broken", options={}, interval_s=0.001)
    await asyncio.sleep(0.05)
    assert scaler.status()["now"] == "holds: the policy failed"
    scaler.configure(settings(interval_s=0.001))
    pool.requests = 35
    pool.may_end.set()
    while pool.ranks != 4:
        await asyncio.sleep(0.001)
    scaler.configure(None)
    await settle()
    assert scaler.status()["settings"] is None
    assert "ZeroDivisionError" in caplog.text
    scaler.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "none"},
        {"intervall_s": 1},
        {"interval_s": 0},
        {"bounds": {"min_ranks": 9}},
        {"options": {"grow_window_s": -1}},
        {"dry_run": "no"},
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Autoscaling.parse(wrong)
