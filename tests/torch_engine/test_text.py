"""What the engine says, and that batching, chunking, preemption and replay never change it."""

from __future__ import annotations

import pytest
import torch

from raycore.engine import FinishReason
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import driver_on

pytestmark = pytest.mark.model

TEXTS = (
    "The three primary colours are",
    "Once upon a time there was a small dragon who",
    "def fibonacci(n):",
    "Paris",
    "The recipe for a good pancake begins with flour, eggs and milk. First you",
    "1, 2, 3, 4,",
    "In the year 1969, people first walked on the moon. " * 4,
    "Question: why is the sky blue? Answer:",
)
GREEDY = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def alone(checkpoint, prompts):
    """Greedy continuations, each prompt alone."""
    driver = driver_on(checkpoint, enable_prefix_caching=False)
    return [driver.one(prompt, GREEDY).tokens for prompt in prompts]


def test_the_capital_of_france_is_paris(driver, tokenizer):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    result = driver.one(prompt, SamplingParams(max_tokens=32))
    assert tokenizer.decode(result.tokens) == "The capital of France is Paris."
    assert result.reason is FinishReason.STOP
    assert result.stop_reason is None


def test_sixteen_mixed_prompts_together_say_what_each_says_alone(driver, prompts, alone):
    results = [driver.add(prompt, GREEDY) for prompt in prompts + prompts[::-1]]
    driver.run()
    assert [r.tokens for r in results] == alone + alone[::-1]


def test_it_equals_transformers_own_greedy_generate(checkpoint, prompts, alone):
    model = checkpoint.model
    own = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        for prompt, expected in list(zip(prompts, alone, strict=True))[:3]:
            ids = torch.tensor([prompt])
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
            assert output[0, len(prompt) :].tolist() == expected
    finally:
        model.set_attn_implementation(own)


def test_a_small_step_budget_and_small_blocks_do_not_change_the_text(make_driver, prompts, alone):
    driver = make_driver(max_batch_tokens=7, max_sequences=5, block_size=4)
    results = [driver.add(prompt, GREEDY) for prompt in prompts]
    driver.run()
    assert [r.tokens for r in results] == alone
    driver.engine.check_invariants()


def test_preemption_does_not_change_the_text(make_driver, prompts, alone):
    driver = make_driver(kv_tokens=80, block_size=4)
    results = [driver.add(prompt, GREEDY) for prompt in prompts]
    driver.run()
    assert driver.engine.kv_cache_stats()["preemptions"] > 0
    assert [r.tokens for r in results] == alone
    driver.engine.check_invariants()


def test_requests_that_arrive_while_others_run_change_nothing(make_driver, prompts, alone):
    driver = make_driver()
    results = []
    for prompt in prompts:
        results.append(driver.add(prompt, GREEDY))
        driver.step()
    driver.run()
    assert [r.tokens for r in results] == alone


def test_a_seeded_request_samples_the_same_alone_and_in_a_batch(driver, prompts):
    sampling = [
        SamplingParams(max_tokens=10, temperature=1.0, seed=7),
        SamplingParams(max_tokens=10, temperature=0.8, seed=8, top_k=20),
        SamplingParams(max_tokens=10, temperature=1.2, seed=9, top_p=0.9),
    ]
    alone = [driver.one(prompts[i], s).tokens for i, s in enumerate(sampling)]
    others = [driver.add(prompt, GREEDY) for prompt in prompts]
    together = [driver.add(prompts[i], s) for i, s in enumerate(sampling)]
    driver.run()
    assert [r.tokens for r in together] == alone
    assert all(r.reason is FinishReason.LENGTH for r in others if len(r.tokens) == GREEDY.max_tokens)
    assert driver.one(prompts[0], SamplingParams(max_tokens=10, temperature=1.0, seed=8)).tokens != alone[0]


@pytest.mark.parametrize("cut", [1, 5, 9])
@pytest.mark.parametrize("sampling", [SamplingParams(max_tokens=10), SamplingParams(max_tokens=10, temperature=1.0, seed=3, top_p=0.95)])
def test_a_replay_goes_on_where_the_delivered_tokens_end(driver, make_driver, prompts, sampling, cut):
    whole = driver.one(prompts[1], sampling).tokens
    other = make_driver()
    replay = other.one(prompts[1], sampling, delivered=whole[:cut])
    assert replay.tokens == whole[cut:]
    assert replay.reason is FinishReason.LENGTH


def test_a_replay_whose_end_was_delivered_ends_at_once(driver, prompts):
    whole = driver.one(prompts[0], SamplingParams(max_tokens=4)).tokens
    replay = driver.one(prompts[0], SamplingParams(max_tokens=4), delivered=whole)
    assert (replay.tokens, replay.reason) == ([], FinishReason.LENGTH)


def test_the_handle_column_is_the_same_array_while_the_batch_is(driver, prompts):
    for prompt in prompts[:3]:
        driver.add(prompt, GREEDY)
    driver.step()
    assert driver.engine.step().handles is driver.engine.step().handles
