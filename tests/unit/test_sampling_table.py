"""Sampling values: which are refused, and that nothing but our error comes out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from raycore.errors import InvalidRequestError
from raycore.sampling import SamplingParams, validate_sampling

WRONG: list[tuple[str, Any]] = [
    *[("max_tokens", value) for value in (0, -1, 1.5, "3", None, True, 2**64)],
    *[("min_tokens", value) for value in (-1, 1.5, None, True)],
    *[("temperature", value) for value in (-0.1, math.nan, math.inf, "hot", None, True, -math.inf, 10**400)],
    *[("top_k", value) for value in (-1, 1.5, None, True, 2**64)],
    *[("top_p", value) for value in (0, -0.5, 1.01, math.nan, None, True, 10**400)],
    *[("seed", value) for value in (-1, 2**63, 1.5, "x", True)],
    *[("stop", value) for value in ("abc", ("",), (1,), (b"x",), None, {"a"}, ("\ud800",))],
    *[("stop_token_ids", value) for value in ((-1,), (1.5,), ("x",), (True,), None, 5, (2**64,))],
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{field}={str(value)[:20]!a}" for field, value in WRONG])
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        validate_sampling(SamplingParams(**{field: value}))


def test_more_minimum_than_maximum_is_a_contradiction() -> None:
    with pytest.raises(InvalidRequestError, match=r"min_tokens.*max_tokens"):
        validate_sampling(SamplingParams(min_tokens=5, max_tokens=4))


RIGHT: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"min_tokens": 4, "max_tokens": 4},
    {"temperature": 0},
    {"temperature": 1e-9},
    {"temperature": 5},
    {"top_k": 1},
    {"top_p": 1},
    {"top_p": 1e-6},
    {"seed": 0},
    {"seed": 2**63 - 1},
    {"stop": ("a", "é")},
    {"stop": ["a"]},
    {"stop_token_ids": (0, 5)},
    {"stop_token_ids": [2**32 - 1]},
]


@pytest.mark.parametrize("values", RIGHT)
def test_every_value_in_range_passes(values: dict[str, Any]) -> None:
    validate_sampling(SamplingParams(**values))


@pytest.mark.parametrize("field", ["max_tokens", "min_tokens", "top_k", "seed", "temperature", "top_p"])
@pytest.mark.parametrize("value", [np.array([1, 2]), object(), [], {}, b"1"])
def test_a_value_of_any_other_type_gives_the_typed_error(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError):
        validate_sampling(SamplingParams(**{field: value}))
