"""Characters of several bytes and stop strings that span tokens, on SmolLM2's own tokenizer: the engine's stops and the client's text."""

from __future__ import annotations

import random

import pytest

from raycore.client.text import TextBuilder
from raycore.engine import FinishReason
from raycore.engines.torch.stops import StopChecker
from raycore.sampling import SamplingParams

pytestmark = pytest.mark.model

TEXTS = [
    "Hi 🙂🙃! The family 👨‍👩‍👧‍👦 waves 🇫🇷 flags 👍🏽.",
    "日本語のテキストと한국어, 中文也行。",
    "Cafe\u0301 nai\u0308ve a\u030a e\u0323\u0302 vs Café naïve å ệ",
    "Привет, мир! Ελληνικά; עברית العربية हिन्दी ไทย",
    "math ∑∫√ → ≠ € ½ and \u200bzero\u00a0width",
    "mixed 😀a😀b\n\n```python\nprint('é')\n```",
]


@pytest.mark.parametrize("text", TEXTS)
def test_no_half_character_is_shown_however_the_tokens_come(tokenizer, text) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) or len(text) < len(text.encode())
    for seed in range(6):
        generator = random.Random(seed)
        builder = TextBuilder(tokenizer, (), ())
        pieces, at = [], 0
        while at < len(ids):
            size = 1 if seed == 0 else generator.randint(1, 4)
            part = ids[at : at + size]
            at += len(part)
            pieces.append(builder.push(part, is_last=at >= len(ids)))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def stop_at(tokenizer, ids: list[int], stops: tuple[str, ...]) -> tuple[int, str | None]:
    """After how many tokens the engine's checker ends the request, and why."""
    checker = StopChecker(SamplingParams(max_tokens=10_000, stop=stops), eos_token_ids=(), max_outputs=10_000, tokenizer=tokenizer)
    for count, token in enumerate(ids, start=1):
        stop = checker.push(token)
        if stop is not None:
            assert stop.finish is FinishReason.STOP
            assert isinstance(stop.reason, str)
            return count, stop.reason
    return len(ids), None


def completing_token(tokenizer, ids: list[int], stop: str) -> int:
    """How many tokens it takes until their whole characters hold `stop`."""
    return next(n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n]).rstrip("\ufffd"))


@pytest.mark.parametrize("text", TEXTS)
def test_any_stop_string_ends_the_request_on_its_last_token_and_is_cut_from_the_text(tokenizer, text) -> None:
    ids = tokenizer.encode(text)
    generator = random.Random(1)
    spanning = 0
    for _ in range(40):
        begin = generator.randrange(1, len(text) - 1)
        stop = text[begin : begin + generator.randint(1, 7)]
        count, reason = stop_at(tokenizer, ids, (stop, "never said"))
        assert (count, reason) == (completing_token(tokenizer, ids, stop), stop), repr(stop)
        spanning += len(tokenizer.encode(stop)) > 1
        builder = TextBuilder(tokenizer, (stop,), ())
        pieces = [
            builder.push([token], is_last=n == count, stop_reason=stop if n == count else None)
            for n, token in enumerate(ids[:count], start=1)
        ]
        assert "".join(pieces) == text[: text.find(stop)], repr(stop)
    assert spanning > 10


def test_a_stop_string_of_combining_marks_is_compared_as_it_is_written(tokenizer) -> None:
    ids = tokenizer.encode("un cafe\u0301 noir")
    assert stop_at(tokenizer, ids, ("café",)) == (len(ids), None)
    assert stop_at(tokenizer, ids, ("cafe\u0301",))[1] == "cafe\u0301"
