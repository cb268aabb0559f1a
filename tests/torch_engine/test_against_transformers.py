"""The torch engine beside transformers' own `generate` on SmolLM2 in float32: texts, processed distributions, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raycore.engines.torch.edits import LogitEdits, apply_edits
from raycore.engines.torch.sampler import Choice, filter_candidates, sample
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import Result

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

COUNTRIES = ["France", "Japan", "Egypt", "Peru", "Canada", "Norway", "India", "Kenya", "Spain", "Chile"]
COUNTRIES += ["Italy", "Cuba", "Greece", "Iran", "Poland", "Nepal", "Brazil", "Ghana", "Ireland", "Oman"]
THINGS = ["sun", "moon", "sea", "tree", "river", "bread", "horse", "clock", "winter", "city"]
TEXTS = [
    *(f"The capital of {country} is" for country in COUNTRIES),
    *(f"The {thing} is" for thing in THINGS),
    *(f"Question: What is a {thing}? Answer:" for thing in THINGS),
    *(f"{n}, {n + 1}, {n + 2}," for n in range(5)),
    "def add(a, b):",
    "Once upon a time",
    "Water boils at",
    "Die Hauptstadt von",
    "<html><body>",
]
NEW_TOKENS = 8
NEAR_TIE = 1e-3
"""Logits this close may change places: the padded batch adds in another order, which moves them by some 1e-5."""
REPETITION, BIAS = 1.3, {260: 2.0, 282: -4.0, 5: 1.5}


@dataclass
class Reference:
    """What `generate` gave: tokens and, for each, the raw and the processed logits it was chosen from, [vocabulary]."""

    tokens: list[int]
    logits: list[torch.Tensor]
    scores: list[torch.Tensor]


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    assert len(set(TEXTS)) == 50
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def generate(checkpoint, prompts):
    """transformers' own greedy generation of all prompts in one padded batch."""

    def run(**processors: Any) -> list[Reference]:
        model = checkpoint.model
        own = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        try:
            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
                **processors,
            )
        finally:
            model.set_attn_implementation(own)
        (eos,) = {model.generation_config.eos_token_id}
        references = []
        for row, tokens in enumerate(output.sequences[:, width:].tolist()):
            kept = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
            steps = range(len(kept))
            references.append(
                Reference(kept, [output.logits[i][row].float().cpu() for i in steps], [output.scores[i][row].float().cpu() for i in steps])
            )
        return references

    return run


@pytest.fixture(scope="module")
def greedy(generate) -> list[Reference]:
    return generate()


def common_length(ours: list[int], reference: Reference) -> int:
    """Tokens until the two part; they may part at a near tie only."""
    for place, (mine, theirs) in enumerate(zip(ours, reference.tokens, strict=False)):
        if mine != theirs:
            gap = float(reference.scores[place][theirs] - reference.scores[place][mine])
            assert gap < NEAR_TIE, f"{ours} and {reference.tokens} part at {place}, where the logits differ by {gap}"
            return place
    assert len(ours) == len(reference.tokens)
    return len(ours)


def check_texts(results: Sequence[Result], references: Sequence[Reference]) -> None:
    equal = sum(common_length(r.tokens, ref) == len(ref.tokens) for r, ref in zip(results, references, strict=True))
    assert equal >= 47, f"only {equal} of 50 texts are the same to their end"


def test_greedy_texts_and_log_probabilities_are_those_of_generate(driver, prompts, greedy):
    results = [driver.add(prompt, SamplingParams(max_tokens=NEW_TOKENS, logprobs=5)) for prompt in prompts]
    driver.run()
    check_texts(results, greedy)
    for result, reference in zip(results, greedy, strict=True):
        for place in range(common_length(result.tokens, reference)):
            row, expected = result.logprobs[place], reference.logits[place].log_softmax(-1)
            assert row.token_id == result.tokens[place]
            assert row.rank == 1
            assert row.logprob == pytest.approx(float(expected[row.token_id]), abs=1e-4)
            assert row.top_logprobs == pytest.approx(expected[row.top_ids].tolist(), abs=1e-4)
            assert row.top_logprobs == pytest.approx(expected.topk(5).values.tolist(), abs=1e-4)


def test_repetition_penalty_is_that_of_generate(driver, prompts, generate, greedy):
    references = generate(repetition_penalty=REPETITION)
    assert [r.tokens for r in references] != [r.tokens for r in greedy], "the penalty changed nothing, so this proves nothing"
    results = [driver.add(prompt, SamplingParams(max_tokens=NEW_TOKENS, repetition_penalty=REPETITION)) for prompt in prompts]
    driver.run()
    check_texts(results, references)


def test_logit_bias_is_the_sequence_bias_of_generate_also_with_a_penalty(driver, prompts, generate, greedy):
    references = generate(sequence_bias={(token,): bias for token, bias in BIAS.items()}, repetition_penalty=REPETITION)
    assert [r.tokens for r in references] != [r.tokens for r in greedy], "the bias changed nothing, so this proves nothing"
    sampling = SamplingParams(max_tokens=NEW_TOKENS, logit_bias=BIAS, repetition_penalty=REPETITION)
    results = [driver.add(prompt, sampling) for prompt in prompts]
    driver.run()
    check_texts(results, references)


FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 10},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.6, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 3.0, "top_p": 0.97},
    {"temperature": 1.2, "top_k": 40, "repetition_penalty": 1.3, "logit_bias": BIAS},
]


def processors(params: SamplingParams) -> LogitsProcessorList:
    """transformers' own, in the order in which `generate` makes them."""
    found = LogitsProcessorList()
    if params.logit_bias:
        found.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in dict(params.logit_bias).items()}))
    if params.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    found.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        found.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        found.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        found.append(MinPLogitsWarper(params.min_p))
    return found


def our_distribution(logits: torch.Tensor, params: SamplingParams, prompts: Sequence[list[int]]) -> torch.Tensor:
    """[F, vocabulary] float64, by the sampler's own parts."""
    edited = logits.clone()
    if LogitEdits.are_asked_by(params):
        apply_edits(edited, [(row, LogitEdits(params, prompt)) for row, prompt in enumerate(prompts)], [])
    found = filter_candidates(edited, [params] * len(edited), edited.shape[-1])
    assert bool(found.is_complete.all())
    weights = torch.zeros(edited.shape, dtype=torch.float64).scatter_add_(1, found.ids, found.weights)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("values", FILTERS, ids="-".join)
def test_processed_distributions_are_those_of_transformers_processors(prompts, greedy, values):
    params = SamplingParams(**{"temperature": 1.0, "seed": 1, **values})
    for prompt, reference in zip(prompts, greedy, strict=True):
        logits = reference.logits[0][None]
        expected = processors(params)(torch.tensor([prompt]), logits.clone()).double().softmax(-1)
        ours = our_distribution(logits, params, [prompt])
        # a token on the edge of a filter may fall on either side of it: float32 there, float64 here
        on_one_side = (ours > 0) != (expected > 0)
        assert int(on_one_side.sum()) <= 1
        allowed = 2e-3 if bool(on_one_side.any()) else 1e-5
        assert float((ours - expected).abs().sum()) / 2 < allowed


def test_a_seeded_choice_is_reproducible_and_follows_the_processed_distribution(greedy):
    logits = greedy[0].logits[0].topk(512).values.flip(0)  # a small vocabulary: thousands of rows of the whole one are gigabytes
    values = {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02}
    draws = 4000
    choices = {i: Choice(SamplingParams(seed=11, **values), i) for i in range(draws)}
    tokens = sample(logits.repeat(draws, 1), choices)
    assert tokens == sample(logits.repeat(draws, 1), choices)
    others = {i: Choice(SamplingParams(seed=12, **values), i) for i in range(draws)}
    assert tokens != sample(logits.repeat(draws, 1), others)
    expected = processors(SamplingParams(**values))(torch.tensor([[0]]), logits[None].clone()).softmax(-1)[0]
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)) / draws
    assert set(tokens) <= set(expected.nonzero().flatten().tolist())
    assert len(set(tokens)) > 3
    assert float((counts - expected).abs().max()) < 0.03


def test_seeded_texts_are_the_same_again_and_in_any_company(driver, prompts):
    params = [SamplingParams(max_tokens=6, seed=n, temperature=1.2, top_p=0.9, min_p=0.01 * (n % 3), top_k=40 * (n % 2)) for n in range(10)]
    alone = [driver.one(prompt, p).tokens for prompt, p in zip(prompts, params, strict=False)]
    others = [driver.add(prompt, SamplingParams(max_tokens=6, presence_penalty=1.0)) for prompt in prompts[10:20]]
    together = [driver.add(prompt, p) for prompt, p in zip(prompts, params, strict=False)]
    driver.run()
    assert [result.tokens for result in together] == alone
    assert all(other.tokens for other in others)


def test_prompt_log_probabilities_are_those_of_a_plain_forward_pass(checkpoint, make_driver, prompts, tokenizer):
    texts = [*prompts[:8], tokenizer.encode("In the year 1969, people first walked on the moon. " * 6)]
    driver = make_driver(max_batch_tokens=40, max_sequences=16)
    results = [driver.add(prompt, SamplingParams(max_tokens=1, prompt_logprobs=3)) for prompt in texts]
    driver.run()
    model = checkpoint.model
    own = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        plain = [model(torch.tensor([p], device=model.device)).logits[0].float().cpu().log_softmax(-1) for p in texts]
    finally:
        model.set_attn_implementation(own)
    for prompt, result, expected in zip(texts, results, plain, strict=True):
        assert [row.token_id for row in result.prompt_logprobs] == prompt[1:]
        for place, row in enumerate(result.prompt_logprobs):
            assert row.logprob == pytest.approx(float(expected[place][prompt[place + 1]]), abs=1e-4)
            assert row.top_logprobs == pytest.approx(expected[place].topk(3).values.tolist(), abs=1e-4)


def test_embeddings_of_a_prompt_say_what_its_tokens_say(checkpoint, driver, prompts, greedy):
    table = checkpoint.model.get_input_embeddings()
    for prompt, reference in list(zip(prompts, greedy, strict=True))[:3]:
        tensor = table(torch.tensor(prompt, device=table.weight.device)).detach().cpu()
        result = driver.one([], SamplingParams(max_tokens=NEW_TOKENS), tensors={"prompt_embeds": tensor})
        assert common_length(result.tokens, reference) > 0
