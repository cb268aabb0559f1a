"""Choosing tokens from logits, without a model."""

from __future__ import annotations

import math

import pytest
import torch

from raycore.engines.torch.sampler import CANDIDATES, Choice, sample, uniform
from raycore.sampling import SamplingParams


def choose(logits: torch.Tensor, position: int = 0, banned: tuple[int, ...] = (), **sampling) -> int | None:
    return sample(logits[None].clone(), {0: Choice(SamplingParams(**sampling), position, banned)})[0]


def test_the_numbers_depend_on_seed_and_position_and_fill_the_interval():
    numbers = [uniform(5, position) for position in range(2000)]
    assert numbers == [uniform(5, position) for position in range(2000)]
    assert uniform(6, 0) != uniform(5, 0)
    assert len(set(numbers)) == 2000
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert abs(sum(numbers) / 2000 - 0.5) < 0.03
    assert 0 <= uniform(2**63 - 1, 2**31) < 1


def test_greedy_takes_the_highest_that_is_not_banned():
    logits = torch.tensor([0.0, 3.0, 2.0])
    assert choose(logits) == 1
    assert choose(logits, banned=(1,)) == 2


def test_a_row_without_a_finite_maximum_has_no_token_and_spares_the_others():
    logits = torch.tensor([[math.nan, 1.0], [0.0, 1.0], [-math.inf, -math.inf]])
    params = SamplingParams(temperature=1.0, seed=1)
    assert sample(logits, {0: Choice(params, 0), 2: Choice(params, 0)}) == [None, 1, None]


def test_frequencies_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = 4000
    tokens = sample(probabilities.log().repeat(rows, 1), {i: Choice(SamplingParams(temperature=1.0, seed=1), i) for i in range(rows)})
    for token, probability in enumerate(probabilities.tolist()):
        assert abs(tokens.count(token) / rows - probability) < 0.03


@pytest.mark.parametrize(
    ("limits", "allowed"), [({"top_k": 2}, {1, 3}), ({"top_p": 0.6}, {1, 3}), ({"top_p": 0.01}, {3}), ({"top_k": 1}, {3})]
)
def test_top_k_and_top_p_cut_the_tail(limits, allowed):
    logits = torch.tensor([0.15, 0.3, 0.05, 0.5]).log()
    seen = {choose(logits, position, temperature=1.0, seed=2, **limits) for position in range(200)}
    assert seen == allowed


def test_top_p_looks_beyond_its_candidates_where_the_mass_is_spread():
    logits = torch.arange(4 * CANDIDATES) * -1e-6
    seen = {choose(logits, position, temperature=1.0, seed=3, top_p=0.9) for position in range(40)}
    assert CANDIDATES < max(seen) < 0.91 * 4 * CANDIDATES


def test_the_batch_around_a_row_does_not_matter():
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 500, generator=source)
    kinds = [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}, {"temperature": 2.0}, {"top_k": 50, "top_p": 0.5}]
    choices = [Choice(SamplingParams(**{"temperature": 1.0, "seed": i, **kind}), i) for i, kind in enumerate(kinds)]
    together = sample(logits.clone(), dict(enumerate(choices)))
    assert together == [sample(logits[i : i + 1].clone(), {0: choices[i]})[0] for i in range(6)]
