"""Saved weights: transformers loads them again, names and sizes are as asked, and nothing is ever half written."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raycore.engines.torch import sharded
from raycore.engines.torch.checksums import tensor_checksum
from raycore.errors import InvalidArgumentsError, SaveError
from raycore.sampling import SamplingParams
from tests.torch_engine.tiny import engine_on, prompts, save_llama, save_mixtral


def save(engine, path, **arguments) -> None:
    engine.utilities()["save_sharded_state"](path=str(path), **arguments)


def logits(path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(path)(input_ids=torch.tensor(prompts(2))).logits


@pytest.mark.parametrize("ties", [False, True])
def test_transformers_loads_what_was_saved(tmp_path, ties):
    model = save_llama(tmp_path / "model", tie_word_embeddings=ties, eos_token_id=[1, 2])
    save(engine_on(model), tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(model))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config.eos_token_id == [1, 2]
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) is not ties
    assert set(index["weight_map"].values()) == {"model-rank-0-part-00001.safetensors"}


def test_names_and_sizes_are_as_asked(tmp_path):
    model = save_llama(tmp_path / "model")
    limit = 20_000
    save(engine_on(model, rank=3), tmp_path / "r{rank}" / "saved", pattern="w{part}of-{rank}.safetensors", max_size=limit)
    folder = tmp_path / "r3" / "saved"
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"w{part:05d}of-3.safetensors" for part in range(1, len(shards) + 1)]
    header = 4096
    assert all((folder / shard).stat().st_size <= limit + header for shard in shards)
    assert torch.equal(logits(folder), logits(model))
    save(engine_on(model), tmp_path / "single", max_size=1)
    names = json.loads((tmp_path / "single" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(names.values())) == len(names), "a tensor above the limit has a shard of its own"
    assert torch.equal(logits(tmp_path / "single"), logits(model))


def test_experts_come_back(tmp_path):
    model = save_mixtral(tmp_path / "moe")
    engine = engine_on(model)
    save(engine, tmp_path / "saved", max_size=30_000)
    assert torch.equal(logits(tmp_path / "saved"), logits(model))
    assert engine_on(tmp_path / "saved").utilities()["compute_weight_checksums"]() == engine.utilities()["compute_weight_checksums"]()


@pytest.mark.timeout(300)  # reading a GGUF file's vocabulary takes long
def test_a_gguf_model_is_saved_with_its_tokenizer(smollm2, driver, tmp_path):
    prompt = "The capital of France is"
    save(smollm2, tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([tokenizer.encode(prompt)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert driver.one(ids[0].tolist(), SamplingParams(max_tokens=8)).tokens == output[0, ids.shape[1] :].tolist()
    save(smollm2, tmp_path / "again")  # the model in memory is as it was


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pattern": "model.safetensors"}, "must hold {part}"),
        ({"pattern": "{part}.bin"}, "name of a .safetensors file"),
        ({"pattern": "a/{part}.safetensors"}, "without a directory"),
        ({"pattern": ".{part}.safetensors"}, "name of a .safetensors file"),
        ({"pattern": "{part}-{world}.safetensors"}, "{world}"),
        ({"pattern": "{part.safetensors"}, "pattern"),
        ({"pattern": "{part:d}.safetensors"}, "pattern"),
        ({"pattern": "{part:.3}.safetensors", "max_size": 1}, "would overwrite each other"),
        ({"max_size": 0}, "max_size must be"),
        ({"max_size": -1}, "max_size must be"),
        ({"path": ""}, "path must name"),
        ({"path": "/tmp/{nothing}"}, "{nothing}"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path, arguments, text):
    engine = engine_on(save_llama(tmp_path / "model"))
    with pytest.raises(InvalidArgumentsError) as refusal:
        save(engine, arguments.get("path", tmp_path / "saved"), **{k: v for k, v in arguments.items() if k != "path"})
    assert text in str(refusal.value)
    assert os.listdir(tmp_path) == ["model"]


def test_a_place_that_is_taken_or_cannot_be_made_is_left_as_it_is(tmp_path):
    model = save_llama(tmp_path / "model")
    engine = engine_on(model)
    before = sorted(os.listdir(model))
    with pytest.raises(SaveError, match="exists: name a new directory"):
        save(engine, model)
    assert sorted(os.listdir(model)) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match=r"cannot save to .*nothing was left"):
        save(engine, tmp_path / "file" / "below")
    for path in ("x" * 300, "~nobody-has-this-name/saved"):
        with pytest.raises(SaveError, match="cannot save to"):
            save(engine, path)
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    engine = engine_on(save_llama(tmp_path / "model"))

    def fail(*_arguments) -> None:
        assert [name for name in os.listdir(tmp_path) if name.startswith(".saved-")]
        raise OSError("no space left")

    monkeypatch.setattr(sharded, "_rename_shards", fail)
    with pytest.raises(SaveError, match="no space left; nothing was left there"):
        save(engine, tmp_path / "saved")
    assert os.listdir(tmp_path) == ["model"]


def test_of_two_that_save_to_one_place_one_wins_whole(tmp_path, monkeypatch):
    model = save_llama(tmp_path / "model")
    engines = [engine_on(model, rank=rank) for rank in (0, 1)]
    together, rename = threading.Barrier(2, timeout=30), sharded._rename_shards

    def rename_together(*arguments) -> None:
        rename(*arguments)
        together.wait()

    monkeypatch.setattr(sharded, "_rename_shards", rename_together)
    failures = []

    def save_one(engine) -> None:
        try:
            save(engine, tmp_path / "saved")
        except SaveError as error:
            failures.append(error)

    threads = [threading.Thread(target=save_one, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 1
    assert torch.equal(logits(tmp_path / "saved"), logits(model))
    assert sorted(os.listdir(tmp_path)) == ["model", "saved"]


# -- checksums and versions ------------------------------------------------------------------------------------------------


def test_checksums_name_every_tensor_once_and_every_expert(tmp_path):
    plain = engine_on(save_llama(tmp_path / "tied", tie_word_embeddings=True)).utilities()["compute_weight_checksums"]()
    assert "model.embed_tokens.weight" in plain
    assert "lm_head.weight" not in plain
    experts = engine_on(save_mixtral(tmp_path / "moe")).utilities()["compute_weight_checksums"]()
    for name in ("gate_up_proj", "down_proj"):
        own = [experts[f"model.layers.1.mlp.experts.{expert}.{name}"] for expert in range(3)]
        assert len(set(own)) == 3
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in experts.values())


def test_checksums_are_equal_where_bytes_are_and_nowhere_else(tmp_path):
    first, second, other = (engine_on(save_llama(tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 0, 1)))
    sums = [engine.utilities()["compute_weight_checksums"]() for engine in (first, second, other)]
    assert sums[0] == sums[1]
    random = [name for name in sums[0] if "norm" not in name]
    assert all(sums[0][name] != sums[2][name] for name in random)
    assert sums[0]["model.norm.weight"] == sums[2]["model.norm.weight"]


def test_a_checksum_sees_every_small_change():
    torch.manual_seed(0)
    weight = torch.randn(300, 333)
    seen = {tensor_checksum(weight)}
    negated, swapped, moved = weight.clone(), weight.clone(), weight.flatten().roll(2).reshape(weight.shape)
    negated[0, 1] *= -1
    negated[5, 5] *= -1
    swapped[:2] = swapped[:2].flip(0)
    last_bit = weight.clone().view(torch.int32)
    last_bit[299, 332] ^= 1
    changes = [
        negated,
        swapped,
        moved,
        last_bit.view(torch.float32),
        weight.T.contiguous(),
        weight.reshape(333, 300),
        weight.view(torch.int32),
    ]
    for change in changes:
        checksum = tensor_checksum(change)
        assert checksum not in seen
        seen.add(checksum)
    assert tensor_checksum(weight.T.contiguous().T) == tensor_checksum(weight), "memory layout is not content"
    for count in (0, 1, 3, 7):
        assert tensor_checksum(torch.zeros(count)) != tensor_checksum(torch.zeros(count + 1))
    odd = torch.arange(21, dtype=torch.bfloat16)
    assert tensor_checksum(odd[1:6]) == tensor_checksum(odd[1:6].clone())


def test_the_weights_have_a_version_once_they_are_given_one(tmp_path):
    utilities = engine_on(save_llama(tmp_path / "model")).utilities()
    assert utilities["get_weight_version"]() is None
    utilities["set_weight_version"](version="step 12")
    assert utilities["get_weight_version"]() == "step 12"
    utilities["sleep"](level=2)
    utilities["wake_up"]()
    assert utilities["get_weight_version"]() == "step 12"


def test_caches_that_a_text_model_lacks_are_reset_without_effect(tmp_path):
    utilities = engine_on(save_llama(tmp_path / "model")).utilities()
    assert utilities["reset_mm_cache"]() is None
    assert utilities["reset_encoder_cache"]() is None
