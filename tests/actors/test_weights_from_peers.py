"""A pool grows while the checkpoint is out of reach: weights, configuration and tokenizer of who joins come from who serves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.control_plane import RayControlPlane
from raycore.client.client import EngineCoreClient
from raycore.client.links import SocketLinks
from raycore.config import HealthConfig, Limits
from raycore.sampling import SamplingParams
from raycore.tokenizer import load_tokenizer
from tests.actors.pools import PoolMaker, ask_controller

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PROMPT = "w5 w8 w13 w21 w34"
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


async def test_a_rank_joins_and_answers_without_its_checkpoint(pools: PoolMaker, tmp_path: Path) -> None:
    from tests.torch_engine.tiny import save_llama, save_tokenizer

    path = save_tokenizer(save_llama(tmp_path / "tiny"))
    tokenizer = load_tokenizer(str(path))
    access = await pools.open(
        "copies",
        engine="torch",
        model=str(path),
        engine_options={"kv_tokens": 1024, "threads": 1},
        data_parallel_size=1,
        num_cpus_per_engine=0.5,
        health=HealthConfig(hang_after_s=10.0, first_beat_s=60.0),
    )
    async with EngineCoreClient(
        access, RayControlPlane("copies", access.timeouts), SocketLinks(access, Limits()), tokenizer=tokenizer
    ) as client:
        expected = await client.generate(PROMPT, GREEDY).collect()
        await client.operations.set_weight_version(version="v2")
        path.rename(tmp_path / "elsewhere")
        long = asyncio.ensure_future(client.generate(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True)).collect())
        grown = await client.scale_elastic_ep(2)
        assert (grown.ranks, grown.joined) == ((0, 1), (1,))
        assert grown.weight_bytes > 0
        assert grown.weight_bytes_from_disk == 0
        assert len((await long).token_ids) == 200
        answer = await client.generate(PROMPT, GREEDY, data_parallel_rank=1).collect()
        assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)
        word = expected.text.split()[3]
        ended = SamplingParams(max_tokens=12, ignore_eos=True, stop=(word,))
        stopped = await client.generate(PROMPT, ended, data_parallel_rank=1).collect()
        assert word not in stopped.text, "the joiner's engine searches its text for stop strings"
        assert len(stopped.token_ids) < 12
        sums = await client.call_all("compute_weight_checksums")
        assert sums[0] == sums[1]
        (operation,) = (await ask_controller("copies", "status"))["operations"]
        assert operation["weights"]["bytes"] == operation["weights"]["of_bytes"] == grown.weight_bytes
