"""The task "embed": vectors as transformers and the checkpoint's pooling give them, alone, batched, and through a client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, LlamaModel, Qwen3Config, Qwen3ForCausalLM, RobertaConfig, RobertaModel

import raycore
from raycore.engine import EMBED, Engine, EngineRequest, FinishReason, RequestRefused
from raycore.engines.torch import EmbedEngine, TorchEngine, TorchEngineOptions, make_torch_engine
from raycore.errors import ConfigurationError, EngineStateError, InvalidRequestError, NotSupportedError
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import DEVICE
from tests.torch_engine.tiny import TINY, prompts, save_llama

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
LENGTHS = (1, 20, 3, 7, 33, 12)


def save_encoder(path: Path, kind: str = "bert") -> Path:
    torch.manual_seed(0)
    if kind == "bert":
        model = BertModel(BertConfig(**SMALL, max_position_embeddings=64, initializer_range=0.3))
    else:
        model = RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=66, pad_token_id=1, initializer_range=0.3))
    model.save_pretrained(path)
    return path


def save_decoder(path: Path) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=8)).save_pretrained(path)
    return path


def add_modules(
    path: Path, modes: dict[str, bool] | str, *, normalises: bool = False, more: tuple[str, ...] = (), limit: int | None = None
) -> Path:
    """sentence-transformers' files beside a checkpoint."""
    names = ["Transformer", "Pooling", *(["Normalize"] if normalises else []), *more]
    folders = ["", "1_Pooling", *(f"{i}_{name}" for i, name in enumerate(names[2:], start=2))]
    modules = [
        {"idx": i, "path": f, "type": f"sentence_transformers.models.{n}"} for i, (f, n) in enumerate(zip(folders, names, strict=True))
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    config = {"pooling_mode": modes} if isinstance(modes, str) else modes
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **config}))
    if limit is not None:
        (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
    return path


def expected_vector(path: Path, prompt: list[int], mode: str, *, normalises: bool) -> torch.Tensor:
    """transformers' own forward pass over this prompt alone, and the pooling by hand."""
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(path).eval()(input_ids=torch.tensor([prompt])).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.amax(0)}[mode]
    return vector / vector.norm() if normalises else vector


def embed_engine(path: Path, **options: Any) -> Engine:
    return make_torch_engine(TorchEngineOptions(model=str(path), **{"threads": 1, "device": DEVICE, **options}))


def run(engine: Engine, asked: list[list[int]], priorities: list[int] | None = None) -> list[list[int]]:
    """Adds the prompts under handles from 0 and steps to the end; the handles that each step finished. Vectors go to `run.vectors`."""
    for handle, prompt in enumerate(asked):
        priority = priorities[handle] if priorities else 0
        engine.add(EngineRequest(handle, f"r{handle}", np.array(prompt, np.uint32), SamplingParams(), priority=priority, task=EMBED))
    steps = []
    run.vectors = {}
    while engine.has_work():
        output = engine.step()
        assert not len(output.handles)
        assert set(output.reasons) == {FinishReason.STOP}
        run.vectors |= {handle: np.frombuffer(detail.embedding, "<f4") for handle, detail in output.details}
        steps.append(output.finished.tolist())
    return steps


run.vectors = {}


@pytest.mark.parametrize("kind", ["bert", "roberta", "decoder"])
@pytest.mark.parametrize(("mode", "normalises"), [("mean", True), ("cls", False), ("last", True), ("max", False)])
def test_vectors_are_those_of_transformers_and_the_pooling_of_the_checkpoint(tmp_path, kind, mode, normalises):
    path = save_decoder(tmp_path / "m") if kind == "decoder" else save_encoder(tmp_path / "m", kind)
    names = {
        "mean": "pooling_mode_mean_tokens",
        "cls": "pooling_mode_cls_token",
        "last": "pooling_mode_lasttoken",
        "max": "pooling_mode_max_tokens",
    }
    add_modules(path, {name: key == mode for key, name in names.items()}, normalises=normalises)
    asked = [prompts(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
    engine = embed_engine(path)
    assert isinstance(engine, EmbedEngine)
    assert engine.info.tasks == ("embed",)
    assert len(run(engine, asked)) == 1, "all in one step"
    for handle, prompt in enumerate(asked):
        vector = expected_vector(path, prompt, mode, normalises=normalises).numpy()
        np.testing.assert_allclose(run.vectors[handle], vector, rtol=1e-4, atol=1e-5)


def test_without_pooling_files_a_causal_model_gives_its_last_token_and_others_the_mean(tmp_path):
    prompt = prompts(1, 9)[0]
    for path, mode, task in ((save_decoder(tmp_path / "d"), "last", "embed"), (save_encoder(tmp_path / "e"), "mean", "auto")):
        run(embed_engine(path, task=task), [prompt])
        np.testing.assert_allclose(run.vectors[0], expected_vector(path, prompt, mode, normalises=False).numpy(), rtol=1e-4, atol=1e-5)


def test_the_checkpoint_says_the_task_unless_the_options_do(tmp_path):
    assert embed_engine(save_decoder(tmp_path / "d"), kv_tokens=64).info.tasks == ("generate",)
    assert embed_engine(tmp_path / "d", task="embed").info.tasks == ("embed",)
    torch.manual_seed(0)
    LlamaModel.from_pretrained(save_llama(tmp_path / "l")).save_pretrained(tmp_path / "body")
    assert embed_engine(tmp_path / "body").info.tasks == ("embed",)
    add_modules(tmp_path / "d", "lasttoken")
    assert embed_engine(tmp_path / "d").info.tasks == ("embed",)
    assert isinstance(embed_engine(tmp_path / "d", task="generate", kv_tokens=64), TorchEngine)
    with pytest.raises(ConfigurationError, match="task must be one of auto, generate, embed"):
        embed_engine(tmp_path / "d", task="classify")


def test_steps_take_prompts_in_order_within_the_token_budget(tmp_path):
    engine = embed_engine(save_encoder(tmp_path / "e"), max_batch_tokens=40, max_sequences=3)
    asked = [prompts(1, length)[0] for length in (10, 10, 10, 30, 2, 2, 2, 2)]
    assert run(engine, asked) == [[0, 1, 2], [3], [4, 5, 6], [7]]
    assert run(engine, asked, priorities=[0, 0, 0, 0, -1, -1, -1, -2]) == [[7, 4, 5], [6, 0, 1], [2], [3]]


@pytest.mark.parametrize(
    ("modes", "options", "text"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, {}, "asks for the pooling pooling_mode_weightedmean_tokens; supported is one of"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, {}, "mean and cls"),
        ({"pooling_mode_mean_tokens": False}, {}, "of nothing"),
        ("attention", {}, "attention"),
        ("mean", {"more": ("Dense",)}, "asks for Dense; supported are"),
    ],
)
def test_pooling_that_is_not_supported_is_refused_by_name(tmp_path, modes, options, text):
    add_modules(save_encoder(tmp_path / "e"), modes, **options)
    with pytest.raises(ConfigurationError) as refusal:
        embed_engine(tmp_path / "e")
    assert text in str(refusal.value)


def test_broken_pooling_files_are_refused(tmp_path):
    path = add_modules(save_encoder(tmp_path / "e"), "mean")
    (path / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot read"):
        embed_engine(path)
    (path / "modules.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="holds no list"):
        embed_engine(path)
    (path / "modules.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="names no Pooling"):
        embed_engine(path)


def test_a_prompt_that_cannot_be_served_is_refused(tmp_path):
    path = add_modules(save_encoder(tmp_path / "e", "roberta"), "mean", limit=48)
    engine = embed_engine(path)
    assert engine.info.max_model_len == 48
    assert embed_engine(save_encoder(tmp_path / "r", "roberta")).info.max_model_len == 64
    for prompt, text in (([], "empty"), ([5] * 49, "has 49 tokens; the model takes at most 48"), ([97], "outside the vocabulary")):
        with pytest.raises(RequestRefused, match=text):
            engine.add(EngineRequest(0, "r", np.array(prompt, np.uint32), SamplingParams(), task=EMBED))
    with pytest.raises(RequestRefused, match="loaded to embed, not to generate"):
        engine.add(EngineRequest(0, "r", np.array([5], np.uint32), SamplingParams()))
    with pytest.raises(ConfigurationError, match="max_model_len"):
        embed_engine(path, max_model_len=65)


def test_a_vector_that_is_not_finite_ends_its_request_alone(tmp_path):
    path = save_encoder(tmp_path / "e")
    engine = embed_engine(path)
    engine._weights.model.embeddings.word_embeddings.weight.data[50] = float("nan")
    for handle, prompt in enumerate(([5, 6], [5, 50], [7])):
        engine.add(EngineRequest(handle, "r", np.array(prompt, np.uint32), SamplingParams(), task=EMBED))
    output = engine.step()
    assert list(output.reasons) == [FinishReason.STOP, FinishReason.ERROR, FinishReason.STOP]
    assert dict(output.details)[1].error_type == "ArithmeticError"


def config_of(path: Path) -> dict[str, Any]:
    return {"multiprocess_mode": False, "asyncio_mode": False, "engine": "torch", "model": str(path), "engine_options": {"threads": 1}}


def test_a_client_embeds_one_prompt_or_many(tmp_path):
    path = add_modules(save_encoder(tmp_path / "e"), "mean", normalises=True)
    asked = [prompts(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
    with raycore.make_client(**config_of(path)) as client:
        assert client.operations.get_supported_tasks() == ("embed",)
        vectors = client.embed(asked)
        assert (vectors.dtype, vectors.shape) == (np.float32, (len(asked), 32))
        one = client.embed(asked[1])
        assert one.shape == (32,)
        np.testing.assert_allclose(one, vectors[1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one, expected_vector(path, asked[1], "mean", normalises=True), rtol=1e-4, atol=1e-5)
        assert client.in_flight() == 0
        with pytest.raises(InvalidRequestError, match="supports embed, not generate"):
            client.generate([5, 6])
        empty = (([], "no prompt to embed"), ([[5], []], "the prompt is empty"))
        for wrong, text in (*empty, ([5] * 65, "at most 64"), ([[5], [97]], "97"), ("text", "tokenizer")):
            with pytest.raises(InvalidRequestError, match=text):
                client.embed(wrong)
        assert client.in_flight() == 0
        client.operations.sleep(level=2)
        with pytest.raises(EngineStateError, match="wake_up"):
            client.operations.save_sharded_state(path=str(tmp_path / "saved"))
        client.operations.wake_up()
        np.testing.assert_array_equal(client.embed(asked[1]), one)
        client.operations.save_sharded_state(path=str(tmp_path / "saved"))
        assert torch.equal(
            AutoModel.from_pretrained(tmp_path / "saved").embeddings.word_embeddings.weight,
            AutoModel.from_pretrained(path).embeddings.word_embeddings.weight,
        )
        for name in ("list_loras", "release_kv_cache_memory", "reset_prefix_cache"):
            with pytest.raises(NotSupportedError, match=name):
                getattr(client.operations, name)()


def test_a_model_that_generates_refuses_to_embed(tmp_path):
    config = config_of(save_decoder(tmp_path / "d"))
    with raycore.make_client(**config) as client, pytest.raises(InvalidRequestError, match="supports generate, not embed"):
        client.embed([5, 6])
