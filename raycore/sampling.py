"""Sampling parameters of a request, and the checks that both doors run on them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection

import msgspec

from raycore.errors import InvalidRequestError

MAX_TOKENS = 2**31 - 1
"""Bound of counts, so that they fit an int32 on a device."""
MAX_SEED = 2**63 - 1
"""Seeds are non-negative int64, so that they mean the same to torch and to numpy."""
MAX_LOGPROBS = 20
"""The most alternatives a token's log probabilities may come with."""
MAX_N = 128
"""The most answers that one request may ask for."""
MAX_BIAS = 1e4
"""Bound of a bias: beyond every logit of a real model, and float32 keeps what is added to it apart."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 1e-3, 1e3
"""Beyond these a penalised logit may leave float32."""
MAX_PENALTY = 2.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request's tokens are chosen, when it stops, and what is told of each token.

    Only what differs from the defaults travels. The logits of one token are processed in this order, that of transformers' `generate`:
    `logit_bias`, `repetition_penalty`, `presence_penalty` and `frequency_penalty`, then ids that would end the request before
    `min_tokens` are banned; temperature 0 takes the highest; otherwise temperature, `top_k`, `top_p`, `min_p`, and a draw. The token at a
    position depends on (seed, position) and the distribution only, so that a replay repeats the same choices.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens, and those as likely as the k-th; 0 is off."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability; 1 is off."""
    seed: int | None = None
    """None: one is drawn at admission."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that prompt or output hold (Keskar et al., 2019); 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the output holds; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time that the output holds the token; -2 to 2."""
    logit_bias: tuple[tuple[int, float], ...] | dict[int, float] = ()
    """Added to the logits of these token ids: a dict, or (id, bias) pairs."""
    logprobs: int | None = None
    """The log probability of each output token, and of so many likeliest beside it. Of the model's own distribution: float32, before all
    of the above."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; the prefix cache is then not read for this prompt."""
    n: int = 1
    """Answers to give; above 1 the client makes so many requests of it, `child_seed` gives their seeds."""


def validate_sampling(params: SamplingParams) -> None:
    """Raise InvalidRequestError for a value out of range or two that contradict each other."""
    problem = _first_problem(params)
    if problem:
        raise InvalidRequestError(problem)


def check_decoded(p: SamplingParams) -> None:
    """The same for parameters that a typed decoder made, whose types are right: cheap, for the engine's door. There `n` is 1."""
    is_fine = (
        0 <= p.min_tokens <= p.max_tokens <= MAX_TOKENS
        and p.max_tokens
        and 0.0 <= p.temperature < math.inf
        and 0 <= p.top_k <= MAX_TOKENS
        and 0.0 < p.top_p <= 1.0
        and (p.seed is None or 0 <= p.seed <= MAX_SEED)
        and p.repetition_penalty == 1.0
        and p.n == 1
    )
    is_rare = (
        p.stop
        or p.stop_token_ids
        or p.min_p
        or p.presence_penalty
        or p.frequency_penalty
        or p.logit_bias
        or p.logprobs is not None
        or p.prompt_logprobs is not None
    )
    if not is_fine or is_rare:
        validate_sampling(p)
        if p.n != 1:
            raise InvalidRequestError(f"n is {p.n} at an engine: the client makes n requests of it")


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequestError for a stop or biased token id that the model does not have."""
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", dict(params.logit_bias))):
        highest = max(ids, default=-1)
        if highest >= vocab_size:
            raise InvalidRequestError(f"{name}: token id {highest} is outside the vocabulary of {vocab_size}")


def child_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of n: that of the request itself for answer 0, so that n=1 gives the first of any n.

    The others are 63 bits of BLAKE2b over "seed/index", so that requests with neighbouring seeds share no answer.
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "big") >> 1


def _first_problem(p: SamplingParams) -> str | None:
    for checks in (_checks_of_choice, _checks_of_logits, _checks_of_ends_and_answers):
        for is_fine, text in checks(p):
            if not is_fine:
                return text
    if p.min_tokens > p.max_tokens:
        return f"min_tokens ({p.min_tokens}) is more than max_tokens ({p.max_tokens})"
    if p.n > 1 and not p.temperature:
        return f"n is {p.n} and temperature 0: greedy answers would all be the same"
    return None


def _checks_of_choice(p: SamplingParams) -> Collection[tuple[bool, str]]:
    return (
        (
            _is_int(p.max_tokens) and 1 <= p.max_tokens <= MAX_TOKENS,
            f"max_tokens must be an integer from 1 to 2**31 - 1, not {p.max_tokens!r}",
        ),
        (_is_int(p.min_tokens) and p.min_tokens >= 0, f"min_tokens must be an integer >= 0, not {p.min_tokens!r}"),
        (_is_finite(p.temperature) and p.temperature >= 0, f"temperature must be a number >= 0, not {p.temperature!r}"),
        (_is_int(p.top_k) and 0 <= p.top_k <= MAX_TOKENS, f"top_k must be 0 (off) or a positive integer, not {p.top_k!r}"),
        (_is_finite(p.top_p) and 0 < p.top_p <= 1, f"top_p must be in (0, 1], not {p.top_p!r}"),
        (_is_finite(p.min_p) and 0 <= p.min_p <= 1, f"min_p must be in [0, 1], not {p.min_p!r}"),
        (
            p.seed is None or (_is_int(p.seed) and 0 <= p.seed <= MAX_SEED),
            f"seed must be None or an integer in [0, 2**63), not {p.seed!r}",
        ),
    )


def _checks_of_logits(p: SamplingParams) -> Collection[tuple[bool, str]]:
    return (
        (
            _is_finite(p.repetition_penalty) and MIN_REPETITION_PENALTY <= p.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"repetition_penalty must be in [{MIN_REPETITION_PENALTY}, {MAX_REPETITION_PENALTY}], 1 is off, not {p.repetition_penalty!r}",
        ),
        *(
            (_is_finite(value) and -MAX_PENALTY <= value <= MAX_PENALTY, f"{name} must be a number from -2 to 2, not {value!r}")
            for name, value in (("presence_penalty", p.presence_penalty), ("frequency_penalty", p.frequency_penalty))
        ),
        (
            _is_bias(p.logit_bias),
            f"logit_bias must map different token ids >= 0 to numbers from -{MAX_BIAS:g} to {MAX_BIAS:g}, not {p.logit_bias!r:.200}",
        ),
    )


def _checks_of_ends_and_answers(p: SamplingParams) -> Collection[tuple[bool, str]]:
    return (
        (
            isinstance(p.stop, (tuple, list)) and all(isinstance(s, str) and s and is_utf8(s) for s in p.stop),
            f"stop must be a tuple of non-empty strings, not {p.stop!r}",
        ),
        (
            isinstance(p.stop_token_ids, (tuple, list)) and all(_is_token_id(t) for t in p.stop_token_ids),
            f"stop_token_ids must be a tuple of integers >= 0, not {p.stop_token_ids!r}",
        ),
        *(
            (
                value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS),
                f"{name} must be None (off) or an integer from 0 to {MAX_LOGPROBS}, not {value!r}",
            )
            for name, value in (("logprobs", p.logprobs), ("prompt_logprobs", p.prompt_logprobs))
        ),
        (_is_int(p.n) and 1 <= p.n <= MAX_N, f"n must be an integer from 1 to {MAX_N}, not {p.n!r}"),
    )


def _is_bias(value: object) -> bool:
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, (tuple, list)):
        pairs = list(value)
    else:
        return False
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):  # noqa: PLR2004 -- an id and its bias
        return False
    if not all(_is_token_id(token) and _is_finite(bias) and -MAX_BIAS <= bias <= MAX_BIAS for token, bias in pairs):
        return False
    return len({token for token, _ in pairs}) == len(pairs)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


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
