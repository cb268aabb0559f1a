"""Sampling parameters of a request, and the check that a client runs on them once."""

from __future__ import annotations

import math

import msgspec

from raycore.errors import InvalidRequestError

MAX_TOKENS = 2**31 - 1
"""Bound of counts, so that they fit an int32 on a device."""
MAX_SEED = 2**63 - 1
"""Seeds are non-negative int64, so that they mean the same to torch and to numpy."""


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How a request's tokens are chosen and when it stops.

    temperature 0 is greedy. `top_k` 0 and `top_p` 1 switch these filters off. `seed` None draws one at admission, so that a replay
    repeats the same choices: the token at a position depends on (seed, position) only.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


def validate_sampling(params: SamplingParams) -> None:
    """Raise InvalidRequestError for a value out of range or two that contradict each other."""
    problem = _first_problem(params)
    if problem:
        raise InvalidRequestError(problem)


def check_decoded(p: SamplingParams) -> None:
    """The same for parameters that a typed decoder made, whose types are right: cheap, for the engine's door."""
    is_fine = (
        0 <= p.min_tokens <= p.max_tokens <= MAX_TOKENS
        and p.max_tokens
        and 0.0 <= p.temperature < math.inf
        and 0 <= p.top_k <= MAX_TOKENS
        and 0.0 < p.top_p <= 1.0
        and (p.seed is None or 0 <= p.seed <= MAX_SEED)
    )
    if not is_fine or p.stop or p.stop_token_ids:
        validate_sampling(p)


def _first_problem(p: SamplingParams) -> str | None:
    checks = (
        (
            _is_int(p.max_tokens) and 1 <= p.max_tokens <= MAX_TOKENS,
            f"max_tokens must be an integer from 1 to 2**31 - 1, not {p.max_tokens!r}",
        ),
        (_is_int(p.min_tokens) and p.min_tokens >= 0, f"min_tokens must be an integer >= 0, not {p.min_tokens!r}"),
        (_is_finite(p.temperature) and p.temperature >= 0, f"temperature must be a number >= 0, not {p.temperature!r}"),
        (_is_int(p.top_k) and 0 <= p.top_k <= MAX_TOKENS, f"top_k must be 0 (off) or a positive integer, not {p.top_k!r}"),
        (_is_finite(p.top_p) and 0 < p.top_p <= 1, f"top_p must be in (0, 1], not {p.top_p!r}"),
        (
            p.seed is None or (_is_int(p.seed) and 0 <= p.seed <= MAX_SEED),
            f"seed must be None or an integer in [0, 2**63), not {p.seed!r}",
        ),
        (
            isinstance(p.stop, (tuple, list)) and all(isinstance(s, str) and s and is_utf8(s) for s in p.stop),
            f"stop must be a tuple of non-empty strings, not {p.stop!r}",
        ),
        (
            isinstance(p.stop_token_ids, (tuple, list)) and all(_is_int(t) and 0 <= t < 2**32 for t in p.stop_token_ids),
            f"stop_token_ids must be a tuple of integers >= 0, not {p.stop_token_ids!r}",
        ),
    )
    for is_fine, text in checks:
        if not is_fine:
            return text
    if p.min_tokens > p.max_tokens:
        return f"min_tokens ({p.min_tokens}) is more than max_tokens ({p.max_tokens})"
    return None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_utf8(text: str) -> bool:
    """Whether `text` can be encoded: lone surrogates cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
