"""The engine's operations over a pool of two ranks with a real model: sleep, adapters, saving, as users call them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import raycore
from raycore.errors import AdapterError, EngineStateError, InvalidRequestError, SaveError
from tests.actors.pools import eventually

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft's
]

SAMPLING = raycore.SamplingParams(max_tokens=10, ignore_eos=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=97, initializer_range=0.5)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    fitted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in fitted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    fitted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def options(model: Path) -> dict[str, Any]:
    return {"engine": "torch", "model": str(model), "data_parallel_size": 2, "engine_options": {"threads": 1, "kv_tokens": 512}}


async def answers(client: Any, **choice: Any) -> list[list[int]]:
    streams = [client.generate([5, 6, 7], SAMPLING, data_parallel_rank=rank, **choice) for rank in (0, 1)]
    return [(await stream.collect()).token_ids for stream in streams]


async def status_when(pool: str, is_sleeping: bool) -> list[dict[str, Any]]:
    async def look() -> list[dict[str, Any]] | None:
        members = (await asyncio.to_thread(raycore.pool_status, pool))["members"]
        return members if all(member["is_sleeping"] is is_sleeping and member["memory"] for member in members) else None

    return await eventually(look, f"is_sleeping {is_sleeping} in the status")


async def test_a_pool_sleeps_wakes_takes_adapters_and_saves(model: Path, adapter: Path, tmp_path: Path) -> None:
    async with raycore.launch(pool="operations", **options(model)) as client:
        operations = client.operations
        plain = await answers(client)
        assert plain[0] == plain[1]

        awake = await status_when("operations", is_sleeping=False)
        frozen = [
            client.generate([8, 9], raycore.SamplingParams(max_tokens=200, ignore_eos=True), data_parallel_rank=rank) for rank in (0, 1)
        ]
        await operations.sleep(level=2, mode="keep")
        assert await operations.is_sleeping() is True
        asleep = await status_when("operations", is_sleeping=True)
        for before, after in zip(awake, asleep, strict=True):
            assert before["memory"]["kv_cache_bytes"] > 0
            assert after["memory"]["kv_cache_bytes"] == 0
            assert after["memory"]["weights_bytes"] < before["memory"]["weights_bytes"]
        with pytest.raises(EngineStateError, match="wake_up"):
            await operations.add_lora(lora_id=1, name="a", path=str(adapter))
        assert await operations.wake_up(tags=["weights"]) is False
        assert await operations.wake_up() is True
        kept = [(await stream.collect()).token_ids for stream in frozen]
        assert len(kept[0]) == 200
        assert (
            kept[0]
            == kept[1]
            == (await client.generate([8, 9], raycore.SamplingParams(max_tokens=200, ignore_eos=True)).collect()).token_ids
        )
        assert await answers(client) == plain

        with pytest.raises(InvalidRequestError, match="no LoRA adapter 'a' is loaded"):
            await answers(client, lora="a")
        assert await operations.add_lora(lora_id=1, name="a", path=str(adapter)) is True
        assert await operations.list_loras() == {1}
        adapted = await answers(client, lora="a")
        assert adapted[0] == adapted[1] != plain[0]
        assert await answers(client, lora=1) == adapted
        assert await answers(client) == plain
        with pytest.raises(AdapterError, match="no such directory"):
            await operations.add_lora(lora_id=2, name="b", path="/nowhere")
        assert await operations.pin_lora(lora_id=1) is True
        assert await operations.remove_lora(lora_id=1) is True

        await operations.save_sharded_state(path=str(tmp_path / "saved"))
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        ids = torch.tensor([[5, 6, 7]])
        again = saved.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0
        )
        assert again[0, 3:].tolist() == plain[0]
        with pytest.raises(SaveError, match="exists"):
            await operations.save_sharded_state(path=str(tmp_path / "saved"))
        assert await client.call_all("save_sharded_state", path=str(tmp_path / "of-{rank}"), pattern="{rank}-{part}.safetensors") == {
            0: None,
            1: None,
        }
        for rank in (0, 1):
            index = json.loads((tmp_path / f"of-{rank}" / "model.safetensors.index.json").read_text())
            assert set(index["weight_map"].values()) == {f"{rank}-00001.safetensors"}

        await operations.set_weight_version(version="7")
        assert await operations.get_weight_version() == "7"
        first, second = await operations.compute_weight_checksums()
        assert first == second
        assert len(first) > 10


def test_the_blocking_client_does_the_same(model: Path, adapter: Path) -> None:
    with raycore.launch(pool="blocking", **options(model)) as client:
        plain = client.generate([5, 6, 7], SAMPLING).collect().token_ids
        client.operations.sleep()
        with pytest.raises(EngineStateError, match="sleeps already, at level 1"):
            client.operations.sleep(level=2)
        assert client.operations.wake_up() is True
        assert client.generate([5, 6, 7], SAMPLING).collect().token_ids == plain
        client.operations.add_lora(lora_id=1, name="a", path=str(adapter))
        assert client.generate([5, 6, 7], SAMPLING, lora="a").collect().token_ids != plain


def test_the_engine_in_process_does_the_same(model: Path, adapter: Path, tmp_path: Path) -> None:
    config = {**options(model), "data_parallel_size": 1}
    with raycore.make_client(multiprocess_mode=False, asyncio_mode=False, **config) as client:
        plain = client.generate([5, 6, 7], SAMPLING).collect().token_ids
        client.operations.sleep(level=2, mode="keep")
        assert client.operations.is_sleeping() is True
        assert client.operations.wake_up() is True
        assert client.generate([5, 6, 7], SAMPLING).collect().token_ids == plain
        client.operations.add_lora(lora_id=1, name="a", path=str(adapter))
        assert client.generate([5, 6, 7], SAMPLING, lora=1).collect().token_ids != plain
        client.operations.save_sharded_state(path=str(tmp_path / "saved"))
        assert (tmp_path / "saved" / "config.json").is_file()
