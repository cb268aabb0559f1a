"""The device path beside the plain one: the same answers by kernels, by recorded graphs, and in bfloat16.

On a GPU (RAYCORE_TEST_DEVICE=cuda) as it is meant to run; with TRITON_INTERPRET=1 the kernels and the batch run on the CPU, without graphs.
"""

from __future__ import annotations

import importlib.util
import logging
import os

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.attention import ATTENTION_NAME
from raycore.engines.torch.batch import lay_out
from raycore.engines.torch.device import DevicePath
from raycore.engines.torch.lean import LeanDecoder
from raycore.engines.torch.loading import Checkpoint
from raycore.engines.torch.scheduler import Chunk
from raycore.engines.torch.sequence import Sequence
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import DEVICE, Driver

ON_GPU = DEVICE == "cuda"
HAS_KERNELS = importlib.util.find_spec("triton") is not None and (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1")
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs RAYCORE_TEST_DEVICE=cuda, or Triton and TRITON_INTERPRET=1")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs RAYCORE_TEST_DEVICE=cuda")

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": None,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=16)),
}
LENGTHS = (1, 3, 30, 17, 64, 5)
SAMPLING = SamplingParams(max_tokens=9, ignore_eos=True)


def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in LENGTHS]


def make(name, *, dtype=torch.float32, **options) -> Driver:
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE, dtype).eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION_NAME)
    checkpoint = Checkpoint(name, model, None)
    driver = Driver(
        TorchEngine.of(
            checkpoint, TorchEngineOptions(**{"model": name, "kv_tokens": 4096, "device": DEVICE, "max_sequences": 8, **options})
        )
    )
    runner = driver.engine._runner
    if not ON_GPU and HAS_KERNELS:
        from raycore.engines.torch.device_step import uniform_heads

        runner._device = DevicePath(runner.model, runner.cache, uniform_heads(runner.cache.layers))
        if options.get("lean", True):
            runner._make_lean()
    return driver


def run_together(driver: Driver) -> list[list[int]]:
    results = [driver.add(prompt, SAMPLING) for prompt in prompts()]
    driver.run()
    return [result.tokens for result in results]


def by_generate(name) -> list[list[int]]:
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE).eval()
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt], device=DEVICE)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, min_new_tokens=9, do_sample=False)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@needs_kernels
@pytest.mark.parametrize(("name", "budget", "lean"), [("llama", 11, True), *((name, 512, True) for name in MODELS), ("mistral", 11, False)])
def test_answers_by_kernels_equal_those_of_generate(name, budget, lean):
    driver = make(name, max_batch_tokens=budget, cuda_graphs=False, lean=lean)
    assert isinstance(driver.engine._runner._device._forward, LeanDecoder) == (lean and name != "gemma2")
    assert driver.engine._runner._device is not None
    assert run_together(driver) == by_generate(name)


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_answers_by_recorded_graphs_equal_those_of_generate(name):
    driver = make(name)
    assert driver.engine._runner._device._graphs is not None
    assert run_together(driver) == by_generate(name)


@needs_gpu
def test_graphs_in_bfloat16_agree_with_the_plain_path():
    answers = [run_together(make("llama", dtype=torch.bfloat16, cuda_graphs=on)) for on in (True, False)]
    firsts = [[tokens[0] for tokens in answer] for answer in answers]
    assert firsts[0] == firsts[1]


@needs_gpu
def test_a_model_that_cannot_be_recorded_runs_without_graphs(caplog, monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("raycore.engines.torch.graphs.DecodeGraphs.record", refuse)
    with caplog.at_level(logging.WARNING, "raycore.engines.torch"):
        driver = make("llama")
    assert "no CUDA graphs for LlamaForCausalLM: operation not permitted" in caplog.text
    assert run_together(driver) == by_generate("llama")


def test_a_layout_puts_decodes_first_and_names_the_rows_of_last_tokens():
    prefill = Sequence(1, list(range(10)), 10, blocks=[4, 7, 2])
    decode = Sequence(2, [5, 6, 7, 8, 9], 3, blocks=[3, 9])
    layout = lay_out([Chunk(prefill, 4, 3), Chunk(decode, 4, 1)], 4)
    assert layout.decodes == 1
    assert layout.token_ids.tolist() == [9, 4, 5, 6]
    assert layout.positions.tolist() == [4, 4, 5, 6]
    assert layout.slots.tolist() == [9 * 4, 7 * 4, 7 * 4 + 1, 7 * 4 + 2]
    assert layout.starts.tolist() == [0, 1, 4]
    assert layout.lengths.tolist() == [5, 7]
    assert layout.logit_rows.tolist() == [0]
