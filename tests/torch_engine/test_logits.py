"""What a request asks of logits, on a tiny random model: edits, log probabilities, embeddings as a prompt, and replays of all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raycore.engine import RequestRefused
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.edits import LogitEdits, OutputCounts, apply_edits
from raycore.engines.torch.loading import Checkpoint
from raycore.engines.torch.scheduler import PROMPT_LOGIT_ROWS
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import DEVICE, Driver

VOCABULARY, HIDDEN = 97, 32
PROMPT = [5, 9, 9, 40, 7, 61, 3, 18, 22, 80, 11]
LONG = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        initializer_range=0.4,  # logits far enough apart that no order hangs on the last bits
    )
    return LlamaForCausalLM(config).eval().to(DEVICE).requires_grad_(False)


@pytest.fixture
def make(model: LlamaForCausalLM):
    model.set_attn_implementation("raycore_paged")

    def made(**options) -> Driver:
        settings = {"model": "tiny", "kv_tokens": 2048, "device": DEVICE, **options}
        return Driver(TorchEngine.of(Checkpoint("tiny", model, None), TorchEngineOptions(**settings)))

    yield made
    model.set_attn_implementation("sdpa")


def plain_logprobs(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    """[T, vocabulary] by the model's own forward pass; row i is of the token after i."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logits = model(torch.tensor([tokens], device=DEVICE)).logits[0].float().cpu()
    model.set_attn_implementation(before)
    return logits.log_softmax(-1)


def check_rows(rows, tokens: list[int], expected: torch.Tensor, width: int) -> None:
    """`expected` [R, vocabulary]: the log probabilities that each row was taken from."""
    assert [row.token_id for row in rows] == tokens
    for row, token, values in zip(rows, tokens, expected, strict=True):
        assert row.logprob == pytest.approx(float(values[token]), abs=1e-4)
        assert row.rank == 1 + int((values > values[token]).sum())
        best = values.topk(width)
        assert row.top_ids == best.indices.tolist()
        assert row.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)


# -- edits


def test_output_counts_grow() -> None:
    counts = OutputCounts()
    tokens = np.random.default_rng(0).integers(0, 60, 500).tolist()
    for token in tokens:
        counts.push(token)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == {t: tokens.count(t) for t in set(tokens)}


def test_edits_are_those_of_their_definitions_row_by_row() -> None:
    generator = np.random.default_rng(1)
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 3
    rows = [
        (0, SamplingParams(repetition_penalty=1.7), [1, 2, 2, 5]),
        (2, SamplingParams(presence_penalty=0.7, frequency_penalty=-0.3, logit_bias={4: 2.5, 7: -1.0}), [9]),
        (3, SamplingParams(logit_bias=((1, 1.0),), repetition_penalty=0.5, frequency_penalty=1.5), [3]),
    ]
    outputs = {row: generator.integers(0, 30, 12).tolist() for row, _, _ in rows}
    edits = []
    expected = logits.clone().double()
    for row, params, prompt in rows:
        edit = LogitEdits(params, prompt)
        for token in outputs[row]:
            edit.output.push(token)
        edits.append((row, edit))
        for token, bias in dict(params.logit_bias).items():
            expected[row, token] += bias
        for token in {*prompt, *outputs[row]} if params.repetition_penalty != 1 else ():
            value = expected[row, token]
            expected[row, token] = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
        for token in set(outputs[row]):
            expected[row, token] -= params.presence_penalty + params.frequency_penalty * outputs[row].count(token)
    expected[1, [3, 4]] = -torch.inf
    apply_edits(logits, edits, [(1, (3, 4))])
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "extra",
    [
        {"repetition_penalty": 0.2},
        {"presence_penalty": -2.0, "frequency_penalty": -2.0},
        {"logit_bias": {7: 6.0, 3: -100.0}},
        {"temperature": 0.9, "seed": 5, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    ],
)
def test_what_a_request_asks_of_logits_changes_its_text_alone_in_a_batch_and_replayed_alike(make, extra) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, **extra)
    driver = make(enable_prefix_caching=False)
    alone = driver.one(PROMPT, params).tokens
    plain = driver.one(PROMPT, LONG).tokens
    assert alone != plain
    beside = [driver.add(PROMPT, LONG), driver.add(PROMPT, params), driver.add([5, 6], LONG)]
    driver.run()
    assert (beside[0].tokens, beside[1].tokens) == (plain, alone)
    for cut in (1, 7):
        assert make().one(PROMPT, params, delivered=alone[:cut]).tokens == alone[cut:]
    small = make(kv_tokens=48, block_size=4, max_batch_tokens=16, max_sequences=4, enable_prefix_caching=False)
    crowd = [small.add(PROMPT, params) for _ in range(3)]
    small.run()
    assert small.engine.kv_cache_stats()["preemptions"] > 0
    assert [result.tokens for result in crowd] == [alone] * 3
    small.engine.check_invariants()


def test_a_large_bias_is_a_ban_or_a_command(make) -> None:
    driver = make()
    assert driver.one(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={33: 1e4})).tokens == [33, 33, 33]
    first = driver.one(PROMPT, SamplingParams(max_tokens=1)).tokens[0]
    assert driver.one(PROMPT, SamplingParams(max_tokens=1, logit_bias={first: -1e4})).tokens != [first]


# -- log probabilities


def test_logprobs_are_the_models_own_whatever_edits_the_choice(make, model) -> None:
    driver = make()
    asked = [
        SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3),
        SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0, logit_bias={33: 8.0}),
        SamplingParams(max_tokens=6, ignore_eos=True, logprobs=5, temperature=3.0, seed=1, repetition_penalty=1.5),
    ]
    results = [driver.add(PROMPT, params) for params in asked]
    silent = driver.add(PROMPT, LONG)
    driver.run()
    for params, result in zip(asked, results, strict=True):
        expected = plain_logprobs(model, PROMPT + result.tokens)[len(PROMPT) - 1 : -1]
        check_rows(result.logprobs, result.tokens, expected, params.logprobs)
    assert max(row.rank for row in results[2].logprobs) > 1
    assert silent.logprobs == []


def test_more_alternatives_than_the_vocabulary_has_are_all_of_it(model) -> None:
    narrow = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=7)
    ).eval()
    narrow.set_attn_implementation("raycore_paged")
    driver = Driver(TorchEngine.of(Checkpoint("narrow", narrow, None), TorchEngineOptions(model="narrow", kv_tokens=64, device="cpu")))
    result = driver.one([1, 2], SamplingParams(max_tokens=2, ignore_eos=True, logprobs=20))
    assert [len(row.top_ids) for row in result.logprobs] == [7, 7]


def test_a_replay_repeats_no_log_probability(make) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=2)
    whole = make().one(PROMPT, params)
    replay = make().one(PROMPT, params, delivered=whole.tokens[:2])
    assert [row.token_id for row in replay.logprobs] == whole.tokens[2:]
    assert [row.top_ids for row in replay.logprobs] == [row.top_ids for row in whole.logprobs[2:]]
    assert replay.prompt_logprobs == []


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 5, "max_sequences": 2}, {"block_size": 4}])
@pytest.mark.parametrize("length", [1, 2, 11, 33])
def test_prompt_logprobs_are_those_of_a_plain_forward_pass(make, model, options, length) -> None:
    prompt = [(7 * i) % VOCABULARY for i in range(length)]
    driver = make(**options)
    driver.one(prompt, LONG)  # fills the prefix cache, which must not be read
    result, other = driver.add(prompt, SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=4)), driver.add(prompt, LONG)
    driver.run()
    check_rows(result.prompt_logprobs, prompt[1:], plain_logprobs(model, prompt)[:-1], 4)
    assert result.details == []
    assert other.prompt_logprobs == []


def test_a_long_prompts_logits_go_in_pieces_and_preemption_does_not_double_them(make, model) -> None:
    prompt = [(11 * i) % VOCABULARY for i in range(PROMPT_LOGIT_ROWS + 150)]
    driver = make(max_batch_tokens=1024)
    result, other = (driver.add(prompt, SamplingParams(max_tokens=1, prompt_logprobs=1)) for _ in range(2))
    driver.step()
    assert driver.engine.load().prefill_tokens_waiting == 2 * len(prompt) - PROMPT_LOGIT_ROWS
    driver.engine.reset_prefix_cache(reset_running_requests=True)
    driver.run()
    for one in (result, other):
        check_rows(one.prompt_logprobs, prompt[1:], plain_logprobs(model, prompt)[:-1], 1)


# -- embeddings as a prompt


def embedded(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    return model.get_input_embeddings()(torch.tensor(tokens, device=DEVICE)).cpu().clone()


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 4, "max_sequences": 4}])
@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.double(), lambda t: t.numpy()], ids=["float32", "float64", "numpy"])
def test_embeddings_of_tokens_say_what_the_tokens_say(make, model, options, convert) -> None:
    driver = make(**options)
    plain = driver.one(PROMPT, LONG).tokens
    tensors = {"prompt_embeds": convert(embedded(model, PROMPT))}
    beside = driver.add([5, 6], LONG)
    result = driver.add([], LONG, tensors=tensors)
    driver.run()
    assert result.tokens == plain
    assert beside.tokens == make().one([5, 6], LONG).tokens
    for cut in (1, 5):
        assert make(**options).one([], LONG, tensors=tensors, delivered=plain[:cut]).tokens == plain[cut:]


def test_embeddings_never_meet_the_prefix_cache(make, model) -> None:
    driver = make(block_size=4)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        driver.one([], LONG, tensors={"prompt_embeds": torch.randn(13, HIDDEN, generator=generator)})
    zeros = driver.one([0] * 13, LONG)
    assert driver.engine.kv_cache_stats()["prefix_hit_tokens"] == 0
    assert zeros.tokens == make().one([0] * 13, LONG).tokens


def test_embeddings_survive_preemption(make, model) -> None:
    tensors = {"prompt_embeds": embedded(model, PROMPT)}
    expected = make().one(PROMPT, LONG).tokens
    driver = make(kv_tokens=48, block_size=4, max_batch_tokens=16, max_sequences=4)
    results = [driver.add([], LONG, tensors=tensors) for _ in range(3)]
    driver.run()
    assert driver.engine.kv_cache_stats()["preemptions"] > 0
    assert [result.tokens for result in results] == [expected] * 3


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(3, HIDDEN + 1), r"shape \[prompt tokens, 32\]"),
        (torch.zeros(HIDDEN), "shape"),
        (torch.zeros(0, HIDDEN), "shape"),
        (torch.zeros(3, HIDDEN, dtype=torch.int64), "floating point tensor, not int64"),
        (torch.full((3, HIDDEN), float("nan")), "not finite"),
        (np.full((3, HIDDEN), np.inf), "not finite"),
        (torch.zeros(1024, HIDDEN), "at most 1024"),
        ("text", "floating point tensor, not str"),
        (torch.zeros(3, HIDDEN, device="meta"), "cannot be read"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(make, tensor, text) -> None:
    driver = make()
    with pytest.raises(RequestRefused, match=f"prompt_embeds.*{text}"):
        driver.add([], LONG, tensors={"prompt_embeds": tensor})
    assert not driver.engine.has_work()


def test_embeddings_beside_ids_or_with_prompt_logprobs_are_refused(make, model) -> None:
    tensors = {"prompt_embeds": embedded(model, PROMPT)}
    with pytest.raises(RequestRefused, match="token ids beside prompt_embeds"):
        make().add(PROMPT, LONG, tensors=tensors)
    with pytest.raises(RequestRefused, match="prompt_logprobs"):
        make().add([], SamplingParams(prompt_logprobs=1), tensors=tensors)


def test_a_bias_outside_the_vocabulary_is_refused(make) -> None:
    with pytest.raises(RequestRefused, match="logit_bias: token id 97"):
        make().add(PROMPT, SamplingParams(logit_bias={97: 1.0}))
