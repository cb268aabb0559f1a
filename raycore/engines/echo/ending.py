"""Where an echo request ends, known when it is admitted, since output token i is `prompt[i % len(prompt)]`. Pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raycore.engine import FinishReason, TokenArray
from raycore.engines.echo.options import EOS_TOKEN_ID
from raycore.sampling import SamplingParams

_EOS = -1
"""Marks an ending by the end of sequence, which is no stop that the caller named."""


class Ending(NamedTuple):
    """A request ends when it has `length` output tokens, delivered ones included."""

    length: int
    reason: FinishReason
    stop_reason: int | str | None = None


def echoed(prompt: TokenArray, start: int, stop: int) -> TokenArray:
    """Output tokens of positions [start, stop), uint32."""
    return prompt[np.arange(start, stop) % len(prompt)]


def find_ending(prompt: TokenArray, sampling: SamplingParams, longest: int) -> Ending:
    """The first stop that `min_tokens` allows, or the length; a stop wins over a length at the same token."""
    limit = min(sampling.max_tokens, longest - len(prompt))
    first = max(sampling.min_tokens - 1, 0)
    best = Ending(limit + 1, FinishReason.LENGTH)
    for candidate in (_stop_token(prompt, first, sampling), _stop_string(prompt, first, limit, sampling.stop)):
        if candidate is not None and candidate.length < best.length:
            best = candidate
    if best.length > limit:
        return Ending(limit, FinishReason.LENGTH)
    return best._replace(stop_reason=None) if best.stop_reason == _EOS else best


def _stop_token(prompt: TokenArray, first: int, sampling: SamplingParams) -> Ending | None:
    stops = sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, EOS_TOKEN_ID)
    period = echoed(prompt, first, first + len(prompt))
    hits = np.flatnonzero(np.isin(period, np.array(stops, dtype=np.int64)))
    if not hits.size:
        return None
    token = int(period[hits[0]])
    reason = token if token in sampling.stop_token_ids else _EOS
    return Ending(first + int(hits[0]) + 1, FinishReason.STOP, reason)


def _stop_string(prompt: TokenArray, first: int, limit: int, stops: tuple[str, ...]) -> Ending | None:
    """The stop string that is complete at the earliest token whose position is at least `first`."""
    best: Ending | None = None
    for stop in stops:
        needle = stop.encode()
        # A match may begin before `first`, and tokens without text stretch it: one more round per byte is always enough.
        begin = max(0, first + 1 - len(prompt) * len(needle))
        window = echoed(prompt, begin, min(limit, first + len(prompt) * (len(needle) + 1)))
        positions = np.flatnonzero(window < EOS_TOKEN_ID)
        text = window[positions].astype(np.uint8).tobytes()
        at = text.find(needle)
        while at >= 0 and begin + positions[at + len(needle) - 1] < first:
            at = text.find(needle, at + 1)
        if at < 0:
            continue
        count = begin + int(positions[at + len(needle) - 1]) + 1
        if best is None or count < best.length:
            best = Ending(count, FinishReason.STOP, stop)
    return best
