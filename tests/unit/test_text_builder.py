"""Text for people: characters and stop strings that span tokens."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from raycore.client.text import TextBuilder
from raycore.engine import EngineRequest
from raycore.engines.echo import EchoEngine, EchoOptions
from raycore.ids import Handle, RequestId
from raycore.sampling import SamplingParams
from raycore.tokenizer import ByteTokenizer, IncrementalDetokenizer

TOKENIZER = ByteTokenizer()


def spoken(text: str, stop: tuple[str, ...] = (), cuts: tuple[int, ...] = (), *, ended_by: str | None = None) -> list[str]:
    """The pieces that come out when the bytes of `text` go in, cut at these places."""
    builder = TextBuilder(TOKENIZER, stop, ())
    ids = TOKENIZER.encode(text)
    edges = (0, *cuts, len(ids))
    parts = [ids[a:b] for a, b in itertools.pairwise(edges)]
    last = len(parts) - 1
    return [builder.push(part, is_last=n == last, stop_reason=ended_by if n == last else None) for n, part in enumerate(parts)]


def one_by_one(text: str, stop: tuple[str, ...] = (), *, ended_by: str | None = None) -> list[str]:
    return spoken(text, stop, tuple(range(1, len(text.encode()))), ended_by=ended_by)


def test_text_without_stops_comes_as_it_is() -> None:
    assert one_by_one("hello") == list("hello")


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    assert one_by_one("aé€😀b") == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_what_may_become_a_stop_string_is_held_back_and_cut() -> None:
    assert one_by_one("say END", ("END",), ended_by="END") == ["s", "a", "y", " ", "", "", ""]


def test_a_beginning_that_did_not_become_a_stop_string_is_shown() -> None:
    assert one_by_one("ENx", ("END",)) == ["", "", "ENx"]


def test_a_beginning_at_the_very_end_is_shown() -> None:
    assert "".join(one_by_one("ab EN", ("END",))) == "ab EN"


def test_a_stop_string_that_the_engine_passed_over_is_text() -> None:
    assert "".join(one_by_one("aXbX", ("X",), ended_by="X")) == "aXb"
    assert "".join(one_by_one("aXbX", ("X",))) == "aXbX"


def test_text_behind_a_stop_string_within_the_last_token_is_cut() -> None:
    class Words(ByteTokenizer):
        def decode(self, ids):
            return "".join(("one ", "two END three")[token] for token in ids)

    builder = TextBuilder(Words(), ("END",), ())
    assert builder.push([0, 1], is_last=True, stop_reason="END") == "one two "


def test_the_end_of_sequence_and_stop_tokens_have_no_text() -> None:
    builder = TextBuilder(TOKENIZER, (), (ord("z"),))
    assert builder.push([104, 105, ord("z"), TOKENIZER.EOS], is_last=True, stop_reason=ord("z")) == "hi"


def test_a_stop_string_is_not_shown_when_its_end_comes_without_a_token() -> None:
    builder = TextBuilder(TOKENIZER, ("END",), ())
    shown = builder.push(list(b"say END"), is_last=False)
    assert shown + builder.push([], is_last=True, stop_reason="END") == "say "


@pytest.mark.parametrize("seed", range(20))
def test_any_echo_cut_anywhere_gives_what_stands_before_the_stop_string_that_ended_it(seed: int) -> None:
    generator = random.Random(seed)
    alphabet = "abé€😀"
    for _ in range(40):
        prompt = "".join(generator.choices(alphabet, k=generator.randint(1, 12)))
        stop = tuple("".join(generator.choices(alphabet, k=generator.randint(1, 3))) for _ in range(generator.randint(0, 3)))
        ids, reason = echo(prompt, stop, generator.choice([0, 0, 4]))
        whole = TOKENIZER.decode(ids)
        # the stop string is complete with the last byte, so it is the text's end
        expected = whole.removesuffix(reason) if reason else whole
        assert reason is None or whole.endswith(reason)
        cuts = tuple(sorted(generator.sample(range(1, len(ids)), min(len(ids) - 1, generator.randint(0, 8)))))
        builder, grown = TextBuilder(TOKENIZER, stop, ()), ""
        edges = (0, *cuts, len(ids))
        for begin, end in itertools.pairwise(edges):
            is_last = end == len(ids)
            grown += builder.push(ids[begin:end], is_last=is_last, stop_reason=reason if is_last else None)
            assert expected.startswith(grown), f"seed {seed}: something was shown that did not stay"
        assert grown == expected, f"seed {seed}: {prompt!r} {stop!r} {cuts}"


def echo(prompt: str, stop: tuple[str, ...], min_tokens: int) -> tuple[list[int], str | None]:
    """What the echo engine says, and the stop string that ended it."""
    engine = EchoEngine(EchoOptions())
    column = np.array(TOKENIZER.encode(prompt), np.uint32)
    engine.add(EngineRequest(Handle(0), RequestId("r"), column, SamplingParams(max_tokens=40, stop=stop, min_tokens=min_tokens)))
    ids: list[int] = []
    while engine.has_work():
        output = engine.step()
        ids += output.tokens.tolist()
        for _, detail in output.details:
            assert isinstance(detail.stop_reason, str)
            return ids, detail.stop_reason
    return ids, None


@pytest.mark.parametrize("seed", range(10))
def test_broken_bytes_come_out_as_a_whole_decoding_would_give_them(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(100):
        ids = [generator.choice([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF, 0xF0]) for _ in range(generator.randint(1, 12))]
        detokenizer = IncrementalDetokenizer(TOKENIZER)
        text = "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush()
        assert text == TOKENIZER.decode(ids), f"seed {seed}: {ids}"
