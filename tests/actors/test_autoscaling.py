"""A pool that scales itself: it grows under load and shrinks without, and says why."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.autoscaling import Autoscaling
from actors.launch import connect, launch
from actors.serve_policy import PoolPolicy
from raycore.errors import ConfigurationError
from raycore.sampling import SamplingParams
from tests.actors.pools import PoolMaker, ask_controller, eventually

pytestmark = pytest.mark.ray

WORK: dict[str, Any] = {
    "options": {"requests_per_rank": 8, "grow_window_s": 1, "shrink_window_s": 2, "panic_window_s": 1},
    "bounds": {"max_ranks": 2, "cool_down_s": 0.5, "cool_down_factor": 0},
    "interval_s": 0.1,
    "dry_run": False,
}


async def test_a_pool_grows_under_load_and_shrinks_without(cluster: str, pools: PoolMaker) -> None:
    await pools.open("auto", data_parallel_size=1, engine_options={"base_s": 0.01}, timeouts={"drain_s": 0.2}, autoscaling=WORK)
    async with connect("auto") as client:

        async def ranks(wanted: int) -> bool:
            return len((await ask_controller("auto", "membership")).members) == wanted and len(client.ranks()) == wanted

        async with asyncio.TaskGroup() as group:
            streams = [client.generate([number], SamplingParams(max_tokens=20_000)) for number in range(20)]
            reading = [group.create_task(stream.collect()) for stream in streams]
            await eventually(lambda: ranks(2), "the pool has grown")
            await client.abort_requests([stream.request_id for stream in streams])
        assert all(task.result().finish_reason == "abort" for task in reading)
        await eventually(lambda: ranks(1), "the pool has shrunk")

    async def decisions() -> bool:
        found = (await ask_controller("auto", "status"))["autoscaling"]["decisions"]
        return [(row["ranks"], row["target"], row["outcome"]) for row in found] == [(2, 1, "done"), (1, 2, "done")]

    await eventually(decisions, "both resizes are done, and there was no other")
    await ask_controller("auto", "autoscale", Autoscaling.parse({**WORK, "dry_run": True}))
    assert (await ask_controller("auto", "status"))["autoscaling"]["settings"]["dry_run"]
    await ask_controller("auto", "autoscale", None)
    assert (await ask_controller("auto", "status"))["autoscaling"]["settings"] is None


async def test_serves_policy_tells_the_controller_and_tells_it_again(cluster: str, pools: PoolMaker) -> None:
    now_s = [0.0]
    policy = PoolPolicy("served", options={"requests_per_rank": 5}, bounds={"max_ranks": 3}, clock=lambda: now_s[0])

    async def settings() -> Any:
        now_s[0] += 60.0
        assert policy(SimpleNamespace(target_num_replicas=2)) == (2, {})
        return await ask_controller("served", "autoscaling")

    assert policy(SimpleNamespace(target_num_replicas=7)) == (7, {}), "a pool that is not there yet is no error of Serve's"
    await pools.open("served", data_parallel_size=1)
    found = await eventually(settings, "the controller was told")
    assert (found.options, found.bounds.max_ranks, found.dry_run) == ({"requests_per_rank": 5}, 3, False)
    await ask_controller("served", "autoscale", None)
    await eventually(settings, "it is told again")


def test_wrong_settings_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigurationError, match="requests_per_rank"):
        launch(engine="echo", autoscaling={"options": {"requests_per_rank": 0}})
