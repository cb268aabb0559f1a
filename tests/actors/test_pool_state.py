"""Ranks that join a real pool are like those that were there, whatever was called before and while they joined."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.launch import connect
from raycore.errors import EngineStartError
from raycore.sampling import SamplingParams
from tests.actors.pools import LIMIT_S, PoolMaker, ask_controller, eventually

pytestmark = pytest.mark.ray

STATEFUL: dict[str, Any] = {"engine": "tests.support.stateful:make", "data_parallel_size": 1}


async def test_a_rank_that_joins_has_adapters_version_pause_and_sleep(pools: PoolMaker) -> None:
    await pools.open("alike", **STATEFUL)
    async with connect("alike") as client:
        do = client.operations
        await do.add_lora(lora_id=1, name="one", path="/1")
        await do.pin_lora(lora_id=1)
        scaling = asyncio.create_task(client.scale_elastic_ep(2))
        await eventually(lambda: _in_phase("alike"), "the operation has begun")
        await do.set_weight_version(version="two")
        await do.add_lora(lora_id=2, name="two", path="/2")
        await do.pause_scheduler(mode="keep")
        await scaling
        assert await _same(client) == [[[1, "one of /1"], [2, "two of /2"]], [1], "two", []]
        waiting = [client.generate([5, 6], SamplingParams(max_tokens=2), data_parallel_rank=rank) for rank in (0, 1)]
        assert await do.is_scheduler_paused()
        assert await do.collective_rpc(method="steps") == [0, 0]
        await do.resume_scheduler()
        for stream in waiting:
            assert (await asyncio.wait_for(stream.collect(), LIMIT_S)).token_ids == [5, 6]

        await do.sleep(level=1)
        await client.scale_elastic_ep(3)
        assert (await _same(client))[3] == ["kv_cache", "weights"]
        assert await do.wake_up()
        stream = client.generate([5, 6], SamplingParams(max_tokens=2), data_parallel_rank=2)
        assert (await asyncio.wait_for(stream.collect(), LIMIT_S)).token_ids == [5, 6]


async def test_a_joiner_that_cannot_take_the_state_is_undone(pools: PoolMaker, tmp_path: Path) -> None:
    await pools.open("unlike", **STATEFUL)
    async with connect("unlike") as client:
        adapter = tmp_path / "adapter"
        adapter.touch()
        await client.operations.add_lora(lora_id=1, name="one", path=str(adapter))
        adapter.unlink()
        with pytest.raises(EngineStartError, match=r"rank 1 could not be made like the others.*FileNotFoundError"):
            await client.scale_elastic_ep(2)
        assert client.ranks() == (0,)
        await client.operations.remove_lora(lora_id=1)
        assert (await client.scale_elastic_ep(2)).joined == (1,)


async def _in_phase(pool: str) -> bool:
    operations = (await ask_controller(pool, "status"))["operations"]
    return bool(operations) and operations[0]["phase"] in {"spawn", "prepare", "ready"}


async def _same(client: Any) -> list[Any]:
    """What every rank says of itself; they agree."""
    first, *others = await client.operations.collective_rpc(method="what_it_is")
    assert all(other == first for other in others), (first, others)
    return first
