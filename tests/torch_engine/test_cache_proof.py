"""The paged cache, proven on a tiny model: work not done, preemption without a wrong token, nothing lost over 10,000 mixed requests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from raycore.engine import FinishReason
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.blocks import BlockPool
from raycore.engines.torch.scheduler import Scheduler
from raycore.engines.torch.sequence import Sequence
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import Driver

VOCABULARY = 97


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.5,
    )
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def engine_of(path: Path, **options: object) -> Driver:
    return Driver(TorchEngine.create(TorchEngineOptions(model=str(path), block_size=4, **options)))  # type: ignore[arg-type]


def prompts(count: int, seed: int) -> list[list[int]]:
    """Some of them begin alike."""
    source = random.Random(seed)
    heads = [[source.randrange(VOCABULARY) for _ in range(12)] for _ in range(3)]
    return [source.choice([[], *heads]) + [source.randrange(VOCABULARY) for _ in range(source.randint(1, 12))] for _ in range(count)]


def test_a_shared_prefix_is_not_computed_again_and_the_rates_say_so(tiny: Path) -> None:
    driver = engine_of(tiny, kv_tokens=1024)
    prompt, one = list(range(40)), SamplingParams(max_tokens=1)
    first = driver.one(prompt, one)
    before = driver.engine.kv_cache_stats()
    assert (before["prefix_hit_tokens"], before["prefix_hit_rate"], before["prefix_query_tokens"]) == (0, 0.0, 40)
    again = driver.one(prompt, one)
    after = driver.engine.kv_cache_stats()
    assert again.tokens == first.tokens
    # nine of the ten blocks are found: the last token is computed for its logits
    assert after["prefilled_tokens"] - before["prefilled_tokens"] == 4
    assert (after["prefix_hit_tokens"], after["prefix_query_tokens"], after["prefix_hit_rate"]) == (36, 80, 36 / 80)
    assert again.details[0].prompt_tokens_cached == 36
    longer = driver.one([*prompt, 1, 2, 3, 4, 5], one)
    assert longer.details[0].prompt_tokens_cached == 40
    assert driver.engine.reset_prefix_cache()
    cold = driver.engine.kv_cache_stats()["prefilled_tokens"]
    assert driver.one(prompt, one).tokens == first.tokens
    assert driver.engine.kv_cache_stats()["prefilled_tokens"] - cold == 40


def test_without_the_prefix_cache_everything_is_computed_and_no_rate_is_claimed(tiny: Path) -> None:
    driver = engine_of(tiny, kv_tokens=1024, enable_prefix_caching=False)
    for _ in range(2):
        driver.one(list(range(40)), SamplingParams(max_tokens=1))
    stats = driver.engine.kv_cache_stats()
    assert (stats["prefilled_tokens"], stats["prefix_query_tokens"], stats["prefix_hit_rate"]) == (80, 0, 0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preemption_under_pressure_changes_no_token(tiny: Path, temperature: float) -> None:
    asked = [
        (prompt, SamplingParams(max_tokens=20 + i % 7, temperature=temperature, seed=i if temperature else None))
        for i, prompt in enumerate(prompts(24, 5))
    ]
    small, large = engine_of(tiny, kv_tokens=120, max_sequences=8), engine_of(tiny, kv_tokens=8192, max_sequences=8)
    answers = []
    for driver in (small, large):
        results = [driver.add(prompt, sampling, priority=i % 3) for i, (prompt, sampling) in enumerate(asked)]
        driver.run()
        driver.engine.check_invariants()
        assert driver.engine.kv_cache_stats()["blocks_held"] == 0
        answers.append([result.tokens for result in results])
    assert small.engine.kv_cache_stats()["preemptions"] >= 5
    assert large.engine.kv_cache_stats()["preemptions"] == 0
    assert answers[0] == answers[1]
    assert all(len(tokens) == sampling.max_tokens for tokens, (_, sampling) in zip(answers[0], asked, strict=True))


def test_a_thousand_mixed_requests_of_a_real_model_leave_no_block(tiny: Path) -> None:
    """Aborts, shared prefixes, priorities, a cache for a few of them; each that is not aborted is checked against a run of its own."""
    driver, source = engine_of(tiny, kv_tokens=160, max_sequences=6, max_batch_tokens=64), random.Random(11)
    asked = prompts(1000, 7)
    lengths = [source.randint(1, 6) for _ in asked]
    results, live = [], set()
    for handle, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
        results.append(driver.add(prompt, SamplingParams(max_tokens=length), priority=source.randint(-2, 2)))
        live.add(handle)
        if source.random() < 0.3:
            victim = source.choice(sorted(live))
            live.discard(victim)
            driver.engine.abort([victim])
        for _ in range(source.choice((0, 1, 3))):
            if driver.engine.has_work():
                driver.step()
        live = {other for other in live if driver.results[other].reason is None}
    driver.run()
    driver.engine.check_invariants()
    assert driver.engine.kv_cache_stats()["blocks_held"] == 0
    finished = [handle for handle, result in enumerate(results) if result.reason is FinishReason.LENGTH]
    assert 500 < len(finished) < 1000
    alone = engine_of(tiny, kv_tokens=2048)
    for handle in finished[::20]:
        assert alone.one(asked[handle], SamplingParams(max_tokens=lengths[handle])).tokens == results[handle].tokens


def test_ten_thousand_mixed_requests_leave_the_pool_as_it_was() -> None:
    """The scheduler alone: its decisions do not depend on what a model says."""
    source = random.Random(42)
    pool = BlockPool(40)
    scheduler = Scheduler(pool, block_size=4, max_batch_tokens=48, max_sequences=10)
    goals: dict[int, int] = {}
    heads = [[source.randrange(1000) for _ in range(24)] for _ in range(5)]
    served = aborted = added = 0
    for _ in range(1_000_000):
        while added < 10_000 and len(goals) < 30 and source.random() < 0.7:
            head = source.choice(heads)[: source.randint(0, 24)]
            tokens = head + [source.randrange(1000) for _ in range(source.randint(1, 20))]
            added += 1
            goals[added] = len(tokens) + source.randint(1, 30)
            scheduler.add(Sequence(added, tokens, len(tokens), source.randint(0, 3)))
        if not goals:
            break
        if source.random() < 0.05:
            victim = source.choice(list(goals))
            del goals[victim]
            scheduler.remove(victim, discard=source.random() < 0.3)
            aborted += 1
        if source.random() < 0.005:
            scheduler.preempt_all()
        chunks = scheduler.schedule()
        assert chunks or not goals, "work, and nothing is scheduled"
        ends = [chunk for chunk in chunks if chunk.is_last]
        scheduler.computed(chunks)
        for chunk in ends:
            chunk.sequence.tokens.append(source.randrange(1000))
            if len(chunk.sequence.tokens) >= goals[chunk.sequence.handle]:
                del goals[chunk.sequence.handle]
                scheduler.remove(chunk.sequence.handle)
                served += 1
        if added % 50 == 0:
            scheduler.check_invariants()
    assert (added, served + aborted, len(scheduler)) == (10_000, 10_000, 0)
    assert aborted > 500
    assert scheduler.stats.preemptions > 500
    assert scheduler.stats.prefix_hit_tokens > 10_000
    scheduler.check_invariants()
    assert (pool.held, pool.available) == (0, 40)
