"""The engine around the text: refusals, aborts, caches, utilities, checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from raycore.engine import Activity, EngineRequest, FinishReason, RequestRefused
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.loading import find_smollm2
from raycore.errors import ConfigurationError
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import DEVICE, Driver

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


@pytest.fixture
def tiny(tmp_path):
    """A random Llama without a tokenizer, on disk."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, max_position_embeddings=64, eos_token_id=[1, 2])).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def make_tiny(path, **options) -> Driver:
    return Driver(
        TorchEngine.create(
            TorchEngineOptions(model=str(path), **{"kv_tokens": 256, "device": DEVICE, "dtype": "float32", "max_sequences": 32, **options})
        )
    )


def test_a_checkpoint_without_a_tokenizer_serves_token_ids(tiny):
    driver = make_tiny(tiny)
    result = driver.one([5, 6, 7], SamplingParams(max_tokens=5, min_tokens=5))
    assert len(result.tokens) == 5
    assert driver.engine.info.eos_token_ids == (1, 2)
    assert driver.engine.info.max_model_len == 64
    model = LlamaForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([[5, 6, 7]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert result.tokens == output[0, 3:].tolist()
    with pytest.raises(RequestRefused, match="stop strings need a tokenizer"):
        driver.add([5], SamplingParams(stop=("x",)))


def test_a_sliding_window_is_kept_in_prefill_and_decode(tmp_path):
    torch.manual_seed(1)
    model = MistralForCausalLM(MistralConfig(**TINY, head_dim=8, sliding_window=6)).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (1, 30))
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    sampling = SamplingParams(max_tokens=12, min_tokens=12)
    for budget in (512, 7):
        driver = make_tiny(tmp_path, max_batch_tokens=budget, max_sequences=4)
        assert driver.one(ids[0].tolist(), sampling).tokens == expected[0, 30:].tolist()


@pytest.mark.parametrize(
    ("prompt", "sampling", "text"),
    [
        ([], {}, "the prompt is empty"),
        ([3, 97], {}, "token id 97 is outside the vocabulary of 97"),
        ([3] * 64, {}, "the prompt has 64 tokens; at most 63"),
        ([3], {"stop_token_ids": (100,)}, "stop token id 100"),
        ([3], {"temperature": 1.0}, "needs a seed"),
    ],
)
def test_a_bad_request_is_refused_by_name(tiny, prompt, sampling, text):
    driver = make_tiny(tiny)
    with pytest.raises(RequestRefused, match=text):
        driver.add(prompt, SamplingParams(**sampling))
    assert not driver.engine.has_work()
    driver.engine.check_invariants()


def test_a_small_cache_bounds_the_context(tiny):
    driver = make_tiny(tiny, kv_tokens=32)
    assert driver.engine.info.max_model_len == driver.engine.info.kv_tokens == 32
    with pytest.raises(RequestRefused, match="at most 31"):
        driver.add([3] * 32)
    assert len(driver.one([3] * 20, SamplingParams(max_tokens=50, ignore_eos=True)).tokens) == 12


def test_a_sequence_without_finite_logits_fails_alone(tiny):
    driver = make_tiny(tiny)
    with torch.no_grad():
        driver.engine._runner.model.get_input_embeddings().weight[9] = math.nan
    good, bad = driver.add([5, 6], SamplingParams(max_tokens=4, ignore_eos=True)), driver.add([5, 9])
    driver.run()
    assert bad.reason is FinishReason.ERROR
    assert bad.details[-1].error_type == "ArithmeticError"
    assert good.tokens == make_tiny(tiny).one([5, 6], SamplingParams(max_tokens=4, ignore_eos=True)).tokens
    again = [driver.add([6] * 40, SamplingParams(max_tokens=4, ignore_eos=True)) for _ in range(4)]
    driver.run()
    assert all(len(r.tokens) == 4 for r in again), "a NaN was left in the cache"
    driver.engine.check_invariants()


def test_abort_frees_blocks_and_ends_the_output(tiny):
    driver = make_tiny(tiny)
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    gone, stays = driver.add([5] * 20, sampling), driver.add([6] * 20, sampling)
    driver.step()
    held = driver.engine.load().kv_tokens_used
    driver.engine.abort([0, 77])
    assert driver.engine.load().kv_tokens_used < held
    driver.engine.check_invariants()
    driver.run()
    assert (len(gone.tokens), len(stays.tokens)) == (1, 20)
    driver.engine.check_invariants()


def test_prefix_hits_are_counted_reported_and_reset(tiny):
    driver = make_tiny(tiny)
    prompt = list(range(3, 43))
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    first, second = driver.one(prompt, sampling), driver.one(prompt, sampling)
    assert first.tokens == second.tokens
    assert first.details == []
    assert second.details[0].prompt_tokens_cached == 32
    stats = driver.engine.kv_cache_stats()
    assert (stats["prefix_hit_tokens"], stats["prefilled_tokens"]) == (32, 40 + 8)
    assert driver.engine.utilities()["reset_prefix_cache"]() is True
    assert driver.one(prompt, sampling).details == []


def test_a_reset_while_requests_run_is_refused_or_preempts(tiny):
    driver = make_tiny(tiny)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = driver.one([5] * 20, sampling).tokens
    result = driver.add([5] * 20, sampling)
    driver.step()
    assert driver.engine.reset_prefix_cache() is False
    assert driver.engine.reset_prefix_cache(reset_running_requests=True) is True
    assert driver.engine.load().kv_tokens_used == 0
    driver.run()
    assert result.tokens == expected


def test_prefix_caching_can_be_off(tiny):
    driver = make_tiny(tiny, enable_prefix_caching=False)
    for _ in range(2):
        driver.one(list(range(3, 43)), SamplingParams(max_tokens=2, ignore_eos=True))
    assert driver.engine.kv_cache_stats()["prefix_hit_tokens"] == 0


def test_an_idle_step_leaves_running_requests_alone(tiny):
    driver, undisturbed = make_tiny(tiny), make_tiny(tiny)
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    driver.engine.idle_step()
    result = driver.add([5, 6, 7], sampling)
    while driver.engine.has_work():
        driver.step()
        driver.engine.idle_step()
    assert result.tokens == undisturbed.one([5, 6, 7], sampling).tokens


def test_rpc_methods_tell_facts(tiny):
    one, other = make_tiny(tiny).engine, make_tiny(tiny).engine
    assert one.rpc_methods()["weight_checksum"]() == other.rpc_methods()["weight_checksum"]()
    with torch.no_grad():
        other._runner.model.get_input_embeddings().weight[0, 0] += 1
    assert one.rpc_methods()["weight_checksum"]() != other.rpc_methods()["weight_checksum"]()
    memory = one.rpc_methods()["memory_stats"]()
    assert memory["weights_bytes"] > 0
    assert memory["kv_cache_bytes"] == (256 + 16) * 2 * 2 * 2 * 8 * 4
    assert one.budget_s(Activity.LOAD) is not None
    one.close()


def test_what_is_no_checkpoint_is_refused_by_path(tmp_path):
    other = tmp_path / "model.bin"
    other.touch()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF no more")
    cases = {
        "missing": "does not exist",
        "model.bin": "another format",
        "half": "found config.json",
        "": "no checkpoint|cannot load",
        "broken.gguf": "cannot load",
    }
    for name, text in cases.items():
        with pytest.raises(ConfigurationError, match=text) as caught:
            TorchEngine.create(TorchEngineOptions(model=str(tmp_path / name)))
        assert name in str(caught.value)


def test_a_model_without_attention_is_refused(tmp_path):
    MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError):
        TorchEngine.create(TorchEngineOptions(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"max_batch_tokens": 8}, "max_sequences"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"kv_tokens": 3}, "kv_tokens"),
        ({"max_model_len": 65}, "max_model_len"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
    ],
)
def test_a_wrong_option_is_named(tiny, options, text):
    with pytest.raises(ConfigurationError, match=text):
        TorchEngine.create(TorchEngineOptions(model=str(tiny), **options))


@pytest.mark.skipif(DEVICE != "cpu", reason="a machine lent for its GPU need not have the package")
def test_the_package_model_is_found_without_importing_its_package():
    assert find_smollm2().suffix == ".gguf"


def test_a_handle_in_use_is_refused(tiny):
    engine = make_tiny(tiny).engine
    request = EngineRequest(1, "a", np.array([3], dtype=np.uint32), SamplingParams())
    engine.add(request)
    with pytest.raises(RequestRefused, match="in use"):
        engine.add(request)
