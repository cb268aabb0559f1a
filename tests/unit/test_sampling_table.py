"""Sampling values: which are refused, and that nothing but our error comes out."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from raycore.errors import InvalidRequestError
from raycore.messages import Refused
from raycore.sampling import SamplingParams, check_decoded, validate_sampling
from tests.support.scripted import Rig

WRONG: list[tuple[str, Any]] = [
    *[("max_tokens", value) for value in (0, -1, 1.5, "3", None, True, 2**64)],
    *[("min_tokens", value) for value in (-1, 1.5, None, True)],
    *[("temperature", value) for value in (-0.1, math.nan, math.inf, "hot", None, True, -math.inf, 10**400)],
    *[("top_k", value) for value in (-1, 1.5, None, True, 2**64)],
    *[("top_p", value) for value in (0, -0.5, 1.01, math.nan, None, True, 10**400)],
    *[("seed", value) for value in (-1, 2**63, 1.5, "x", True)],
    *[("stop", value) for value in ("abc", ("",), (1,), (b"x",), None, {"a"}, ("\ud800",))],
    *[("stop_token_ids", value) for value in ((-1,), (1.5,), ("x",), (True,), None, 5, (2**64,))],
    *[("min_p", value) for value in (-0.1, 1.1, math.nan, None, "x", True, 10**400)],
    *[("repetition_penalty", value) for value in (0, -1, 1e-9, 1e9, math.nan, math.inf, None, "x", True)],
    *[(field, value) for field in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.nan, None, "x", True)],
    *[("logit_bias", value) for value in ({-1: 1.0}, {1.5: 1.0}, {"x": 1.0}, {True: 1.0}, {2**32: 1.0}, {1: math.nan}, {1: None})],
    *[("logit_bias", value) for value in ({1: 1e5}, {1: -math.inf}, ((1, 1.0), (1, 2.0)), ((1,),), (1, 2), "ab", None, 5, {1: True})],
    *[(field, value) for field in ("logprobs", "prompt_logprobs") for value in (-1, 21, 1.5, "x", True)],
    *[("n", value) for value in (0, -1, 129, 1.5, None, True, "2")],
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{field}={str(value)[:20]!a}" for field, value in WRONG])
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        validate_sampling(SamplingParams(**{field: value}))


def test_more_minimum_than_maximum_is_a_contradiction() -> None:
    with pytest.raises(InvalidRequestError, match=r"min_tokens.*max_tokens"):
        validate_sampling(SamplingParams(min_tokens=5, max_tokens=4))


def test_several_greedy_answers_are_a_contradiction() -> None:
    with pytest.raises(InvalidRequestError, match=r"n is 2 and temperature 0"):
        validate_sampling(SamplingParams(n=2))


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
    {"min_p": 1},
    {"min_p": 0.05, "temperature": 1},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.001},
    {"presence_penalty": -2, "frequency_penalty": 2},
    {"logit_bias": {0: -1e4, 5: 3}},
    {"logit_bias": ((0, 1.0), (7, -2))},
    {"logit_bias": [[3, 1.0]]},
    {"logit_bias": {}},
    {"logprobs": 0},
    {"logprobs": 20, "prompt_logprobs": 0},
    {"n": 128, "temperature": 0.1},
]


@pytest.mark.parametrize("values", RIGHT)
def test_every_value_in_range_passes(values: dict[str, Any]) -> None:
    validate_sampling(SamplingParams(**values))


def decoded(values: dict[str, Any]) -> SamplingParams:
    """The parameters as an engine decodes them: what no decoder lets through is a frame that does not decode."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(values), type=SamplingParams)


@pytest.mark.parametrize("values", [values for values in RIGHT if values.get("n", 1) == 1])
def test_what_is_right_passes_the_engines_door(values: dict[str, Any]) -> None:
    check_decoded(decoded(values))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_p": -0.5}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logit_bias": [[1, 1.0], [1, 1.0]]}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"n": 0}, "n must be"),
        ({"n": 2, "temperature": 1.0}, "n is 2 at an engine"),
    ],
)
def test_what_is_wrong_is_refused_by_name_at_the_engines_door(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        check_decoded(decoded(values))
    rig = Rig()
    peer = rig.peer()
    peer.send(msgspec.structs.replace(peer.add(0), sampling=decoded(values)), peer.add(1, max_tokens=1))
    rig.finish()
    (refused,) = peer.items(Refused)
    assert (refused.slot, refused.error.type) == (0, "InvalidRequestError")
    assert text in refused.error.message
    assert 1 in peer.ended


OTHERS = ["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs", "prompt_logprobs", "n"]


@pytest.mark.parametrize("field", ["max_tokens", "min_tokens", "top_k", "seed", "temperature", "top_p", *OTHERS])
@pytest.mark.parametrize("value", [np.array([1, 2]), object(), [], {}, b"1"])
def test_a_value_of_any_other_type_gives_the_typed_error(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError):
        validate_sampling(SamplingParams(**{field: value}))
