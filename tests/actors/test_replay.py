"""A rank of a real model is killed: greedy, sampled, LoRA and embedded requests go on elsewhere as if nothing had happened, by default."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from actors.launch import connect
from raycore.client.client import EngineCoreClient
from raycore.client.stream import RequestStream
from raycore.errors import EngineDeadError
from raycore.sampling import SamplingParams
from tests.actors.pools import LIMIT_S, PoolMaker
from tests.torch_engine.tiny import save_llama

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

LENGTH = 200


def make_adapter(model: Path, path: Path) -> Path:
    torch.manual_seed(1)
    fitted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in fitted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    fitted.save_pretrained(path)
    return path


def ask_everything(client: EngineCoreClient) -> list[RequestStream]:
    """Two of each kind, so that both ranks have some."""
    sampled = SamplingParams(max_tokens=LENGTH, ignore_eos=True, temperature=1.0, top_p=0.9, presence_penalty=0.5, seed=5)
    greedy = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
    embeds = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    streams: list[RequestStream] = []
    for _ in range(2):
        for stream in (
            client.generate([3, 4, 5], greedy),
            client.generate([3, 4, 5], sampled),
            client.generate([3, 4, 5], greedy, lora="shifted"),
            client.generate(None, greedy, tensors={"prompt_embeds": embeds}),
        ):
            assert isinstance(stream, RequestStream)
            streams.append(stream)
    return streams


async def test_what_ran_on_a_killed_rank_is_the_same_text_in_the_end(pools: PoolMaker, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    adapter = make_adapter(model, tmp_path / "adapter")
    access = await pools.open("replayed", engine="torch", model=str(model), engine_options={"kv_tokens": 4096, "threads": 1})
    async with connect("replayed") as client:
        await client.operations.add_lora(lora_id=1, name="shifted", path=str(adapter))
        wanted = [output.token_ids for output in await asyncio.gather(*(stream.collect() for stream in ask_everything(client)))]
        assert wanted[:4] == wanted[4:], "an answer does not depend on its rank"
        assert len({tuple(tokens) for tokens in wanted}) == 4, "the kinds differ"

        streams = ask_everything(client)
        pinned = client.generate([9], SamplingParams(max_tokens=LENGTH, ignore_eos=True), data_parallel_rank=0)
        firsts = await asyncio.gather(*(anext(stream) for stream in (*streams, pinned)))
        assert {stream.rank for stream in streams} == {0, 1}
        os.kill(access.membership.members[0].pid, signal.SIGKILL)
        async with asyncio.timeout(LIMIT_S):
            rests = await asyncio.gather(*(stream.collect() for stream in streams))
        assert [first.token_ids + rest.token_ids for first, rest in zip(firsts, rests, strict=False)] == wanted
        assert any(rest.replayed for rest in rests)
        with pytest.raises(EngineDeadError):
            await pinned.collect()
        client.check_invariants()
