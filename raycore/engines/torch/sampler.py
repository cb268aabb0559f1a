"""Choosing the next token of each sequence: greedy, temperature, top-k, top-p.

Randomness is counter-based: the number drawn for an output position depends on (seed, position) and nothing else, so that a request
gives the same tokens alone, in any batch, and continued on another engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raycore.sampling import SamplingParams

CANDIDATES = 1024
"""How many of the likeliest tokens top-p looks at before it sorts the whole vocabulary."""


@dataclass(slots=True, frozen=True)
class Choice:
    """What the sampler needs of one row: the parameters, the output position, and ids that must not be chosen now."""

    params: SamplingParams
    position: int
    banned: tuple[int, ...] = ()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) only: one block of Philox-4x64 (Salmon et al., 2011), position as its counter."""
    bits = np.random.Philox(key=seed, counter=position).random_raw()
    return (int(bits) >> 11) * 2.0**-53


@torch.inference_mode()
def sample(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int | None]:
    """A token for each row of logits [S, vocabulary] float32; None where the row has no finite maximum (a NaN, or all banned).

    The logits are changed in place where tokens are banned.
    """
    for row, choice in enumerate(choices):
        if choice.banned:
            logits[row, list(choice.banned)] = float("-inf")
    best, tokens = logits.max(dim=-1)
    chosen: list[int | None] = tokens.tolist()
    for row in (~torch.isfinite(best)).nonzero().flatten().tolist():
        chosen[row] = None
    drawn = [row for row, choice in enumerate(choices) if choice.params.temperature > 0 and chosen[row] is not None]
    whole = [row for row in drawn if not _is_filtered(choices[row].params)]
    if whole:
        for row, token in zip(whole, _draw_from_all(logits[whole], [choices[row] for row in whole]), strict=True):
            chosen[row] = token
    for row in drawn:
        if _is_filtered(choices[row].params):
            chosen[row] = _draw_filtered(logits[row], choices[row])
    return chosen


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _draw_from_all(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
    """Inverse of the cumulative distribution in vocabulary order, in float64.

    In that order the last bits of the logits, which differ between batch shapes, move each boundary by as little; in order of probability
    two near equals could swap whole intervals. It takes one number per token, where Gumbel noise needs one per vocabulary entry.
    """
    temperature = torch.tensor([c.params.temperature for c in choices], dtype=torch.float64, device=logits.device)
    shifted = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature[:, None]
    weights = shifted.exp_().cumsum(dim=-1)
    return [_invert(row, choice) for row, choice in zip(weights, choices, strict=True)]


def _draw_filtered(logits: torch.Tensor, choice: Choice) -> int:
    params = choice.params
    size = logits.shape[-1]
    width = min(size, max(CANDIDATES, params.top_k))
    kept = _filter(logits, params, width)
    if kept is None:
        kept = _filter(logits, params, size)
    assert kept is not None  # noqa: S101
    ids, weights = kept
    ids, order = ids.sort()
    return int(ids[_invert(weights[order].cumsum(0), choice)])


def _filter(logits: torch.Tensor, params: SamplingParams, width: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ids and weights that pass top-k, then top-p of what is left; None when `width` candidates are too few to tell."""
    values, ids = logits.topk(width)
    scaled = (values - values[0]).double() / params.temperature
    weights = scaled.exp()
    if params.top_k > 0:
        weights, ids = weights[: params.top_k], ids[: params.top_k]
        total = weights.sum()
    else:
        total = ((logits - values[0]).double() / params.temperature).exp().sum()
    if params.top_p < 1.0:
        before = weights.cumsum(0) - weights
        count = int((before < params.top_p * total).sum())
        if count == width < logits.shape[-1]:
            return None
        weights, ids = weights[:count], ids[:count]
    return ids, weights


def _invert(cumulative: torch.Tensor, choice: Choice) -> int:
    assert choice.params.seed is not None  # noqa: S101
    target = uniform(choice.params.seed, choice.position) * cumulative[-1]
    # right=True: the first entry above the target, so that an entry of weight 0 is never chosen.
    index = int(torch.searchsorted(cumulative, target, right=True))
    return min(index, len(cumulative) - 1)
