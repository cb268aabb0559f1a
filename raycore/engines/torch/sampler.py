"""Choosing the next token of each sequence: the highest logit, or a draw from what temperature, top-k, top-p and min-p leave.

Randomness is counter-based: the number drawn for an output position depends on (seed, position) and nothing else, so that a request
gives the same tokens alone, in any batch, and continued on another engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raycore.engines.torch.edits import LogitEdits, apply_edits
from raycore.sampling import SamplingParams

CANDIDATES = 1024
"""How many of the likeliest tokens the filters look at first."""
WIDER = 8
"""And how many times as many where those were too few to tell."""


@dataclass(slots=True, frozen=True)
class Choice:
    """What one row wants beyond its highest logit: parameters, output position, edits of its logits, ids that must not be chosen now."""

    params: SamplingParams
    position: int
    banned: Sequence[int] = ()
    edits: LogitEdits | None = None


@dataclass(slots=True, frozen=True)
class Candidates:
    """What the filters left of F rows: `ids` [F, W] int64 in vocabulary order, `weights` [F, W] float64, proportional to probability.

    Places behind the last kept id have weight 0. `is_complete` [F]: False where W candidates were too few to tell.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    is_complete: torch.Tensor


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) only: one block of Philox-4x64 (Salmon et al., 2011), position as its counter."""
    bits = np.random.Philox(key=seed, counter=position).random_raw()
    return (int(bits) >> 11) * 2.0**-53


@torch.inference_mode()
def sample(logits: torch.Tensor, choices: Mapping[int, Choice]) -> list[int | None]:
    """A token for each row of logits [S, vocabulary] float32; None where the row has no finite maximum (a NaN, or all banned).

    `choices`: by row, those that want more than the highest logit. The logits of rows with edits or bans are changed in place.
    """
    if choices:
        edits = [(row, choice.edits) for row, choice in choices.items() if choice.edits is not None]
        apply_edits(logits, edits, [(row, choice.banned) for row, choice in choices.items() if choice.banned])
    chosen = _highest(logits)
    drawn = [row for row, choice in choices.items() if choice.params.temperature > 0 and chosen[row] is not None]
    for draw, rows in (
        (_draw_from_all, [row for row in drawn if not _is_filtered(choices[row].params)]),
        (_draw_filtered, [row for row in drawn if _is_filtered(choices[row].params)]),
    ):
        if rows:
            for row, token in zip(rows, draw(logits[rows], [choices[row] for row in rows]), strict=True):
                chosen[row] = token
    return chosen


def _highest(logits: torch.Tensor) -> list[int | None]:
    """The first highest logit of each row; None where it is not finite."""
    if logits.device.type == "cpu":  # numpy's argmax takes a seventh of the time of torch's max
        rows = logits.numpy()
        tokens = rows.argmax(axis=-1)
        best = np.isfinite(rows[np.arange(len(rows)), tokens]).tolist()
    else:
        values, indices = logits.max(dim=-1)
        tokens = indices
        best = torch.isfinite(values).tolist()
    return [token if is_finite else None for token, is_finite in zip(tokens.tolist(), best, strict=True)]


def filter_candidates(logits: torch.Tensor, params: Sequence[SamplingParams], width: int) -> Candidates:
    """Temperature, then top-k, then top-p of what is left, then min-p, over the `width` likeliest tokens of logits [F, vocabulary]."""
    size = logits.shape[-1]
    temperature = _column(logits, [p.temperature for p in params])
    top_k = torch.tensor([min(p.top_k or size, size) for p in params], device=logits.device)[:, None]
    top_p, min_p = _column(logits, [p.top_p for p in params]), _column(logits, [p.min_p for p in params])
    values, ids = logits.topk(width, dim=-1)
    weights = ((values - values[:, :1]).double() / temperature).exp()
    # tokens as likely as the k-th stay, so that no order among equals decides
    keeps = (top_k == size) | (values >= values.gather(1, top_k.clamp(max=width) - 1))
    weights = weights.where(keeps, 0.0)
    everything = ((logits - values[:, :1]).double() / temperature).exp().sum(-1, keepdim=True)
    total = torch.where(top_k == size, everything, weights.sum(-1, keepdim=True))
    keeps &= (top_p >= 1) | (weights.cumsum(-1) - weights < top_p * total)
    keeps &= weights >= min_p  # the likeliest has weight 1
    order = ids.masked_fill(~keeps, size).argsort(dim=-1)
    is_complete = ~keeps[:, -1] | (width == size)
    return Candidates(ids.gather(1, order), weights.where(keeps, 0.0).gather(1, order), is_complete)


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _column(logits: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]


def _draw_from_all(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
    """Inverse of the cumulative distribution in vocabulary order, in float64.

    In that order the last bits of the logits, which differ between batch shapes, move each boundary by as little; in order of probability
    two near equals could swap whole intervals. It takes one number per token, where Gumbel noise needs one per vocabulary entry.
    """
    temperature = _column(logits, [choice.params.temperature for choice in choices])
    shifted = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature
    return _places(shifted.exp_(), choices).flatten().tolist()


def _draw_filtered(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
    width = max(CANDIDATES, 1 + max(choice.params.top_k for choice in choices))
    tokens: dict[int, int] = {}
    unsure = list(range(len(choices)))
    while unsure:
        found = _draw_candidates(logits[unsure], [choices[row] for row in unsure], min(width, logits.shape[-1]))
        tokens |= {row: token for row, token in zip(unsure, found, strict=True) if token is not None}
        unsure = [row for row in unsure if row not in tokens]
        width *= WIDER
    return [tokens[row] for row in range(len(choices))]


def _draw_candidates(logits: torch.Tensor, choices: Sequence[Choice], width: int) -> list[int | None]:
    """A token for each row, None where `width` candidates were too few."""
    found = filter_candidates(logits, [choice.params for choice in choices], width)
    tokens = found.ids.gather(1, _places(found.weights, choices)).flatten().tolist()
    return [token if is_complete else None for token, is_complete in zip(tokens, found.is_complete.tolist(), strict=True)]


def _places(weights: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """The place [D, 1] in its row of weights [D, W] that each choice's number falls on; never one of weight 0."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    target = _column(weights, [_number(choice) for choice in choices]) * total
    # right=True: the first entry above the target, so that an entry of weight 0 is never chosen
    place = torch.searchsorted(cumulative, target, right=True)
    # a target that rounding brought up to the total belongs to the last entry with a weight
    return torch.minimum(place, torch.searchsorted(cumulative, total))


def _number(choice: Choice) -> float:
    assert choice.params.seed is not None  # noqa: S101
    return uniform(choice.params.seed, choice.position)
