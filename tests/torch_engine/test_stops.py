"""When requests end: strings, ids, lengths; and that nothing is published past an end."""

from __future__ import annotations

import pytest

from raycore.engine import FinishReason
from raycore.engines.torch.stops import Stop, StopChecker
from raycore.sampling import SamplingParams
from raycore.tokenizer import ByteTokenizer


def push_all(checker: StopChecker, data: bytes) -> tuple[int, Stop | None]:
    for count, byte in enumerate(data, start=1):
        stop = checker.push(byte)
        if stop is not None:
            return count, stop
    return len(data), None


def make_checker(max_outputs=1000, **sampling) -> StopChecker:
    parameters = SamplingParams(max_tokens=1000, **sampling)
    return StopChecker(parameters, eos_token_ids=(256,), max_outputs=max_outputs, tokenizer=ByteTokenizer())


def test_a_stop_string_counts_where_its_last_byte_comes():
    assert push_all(make_checker(stop=("world",)), b"hello world, and on") == (11, Stop(FinishReason.STOP, "world"))


def test_a_stop_string_of_several_byte_characters_needs_all_its_bytes():
    text = "wie schön 🙂 das ist".encode()
    count, stop = push_all(make_checker(stop=("🙂",)), text)
    assert stop == Stop(FinishReason.STOP, "🙂")
    assert text[:count].decode().endswith("🙂")


def test_the_stop_string_that_begins_first_is_named():
    assert push_all(make_checker(stop=("c", "abc")), b"xxabc")[1] == Stop(FinishReason.STOP, "abc")
    assert push_all(make_checker(stop=("bcd", "c")), b"abcd")[1] == Stop(FinishReason.STOP, "c")


def test_min_tokens_bans_ids_and_puts_off_strings():
    checker = make_checker(stop=("b",), stop_token_ids=(99,), min_tokens=3)
    assert set(checker.banned) == {99, 256}
    assert push_all(checker, b"ab") == (2, None)
    assert set(checker.banned) == {99, 256}
    assert checker.push(ord("a")) is None
    assert checker.banned == ()
    assert checker.push(ord("b")) == Stop(FinishReason.STOP, "b")


def test_ignore_eos_leaves_stop_ids():
    checker = make_checker(ignore_eos=True, stop_token_ids=(7,))
    assert checker.push(256) is None
    assert checker.push(7) == Stop(FinishReason.STOP, 7)


def test_eos_has_no_stop_reason_and_length_comes_last():
    assert make_checker().push(256) == Stop(FinishReason.STOP)
    assert make_checker(max_outputs=1).push(256) == Stop(FinishReason.STOP)
    assert make_checker(max_outputs=1).push(5) == Stop(FinishReason.LENGTH)


CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.model
def test_a_stop_string_across_tokens_ends_the_request_on_its_last_token(driver, tokenizer):
    result = driver.one(tokenizer.apply_chat_template(CHAT), SamplingParams(max_tokens=32, stop=("of Fran", "never")))
    assert tokenizer.decode(result.tokens) == "The capital of France"
    assert (result.reason, result.stop_reason) == (FinishReason.STOP, "of Fran")


@pytest.mark.model
def test_a_replay_finds_a_stop_string_that_begins_in_the_delivered_tokens(driver, tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT)
    sampling = SamplingParams(max_tokens=32, stop=("capital of France",))
    whole = driver.one(prompt, sampling)
    replay = driver.one(prompt, sampling, delivered=whole.tokens[:2])
    assert replay.tokens == whole.tokens[2:]
    assert replay.stop_reason == "capital of France"


@pytest.mark.model
def test_a_stop_id_is_published_and_named(driver, tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT)
    whole = driver.one(prompt, SamplingParams(max_tokens=32)).tokens
    result = driver.one(prompt, SamplingParams(max_tokens=32, stop_token_ids=(whole[2],)))
    assert (result.tokens, result.reason, result.stop_reason) == (whole[:3], FinishReason.STOP, whole[2])


@pytest.mark.model
def test_min_tokens_and_ignore_eos_go_past_the_end_of_the_answer(driver, tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT)
    ends = set(driver.engine.info.eos_token_ids)
    longer = driver.one(prompt, SamplingParams(max_tokens=32, min_tokens=15))
    assert len(longer.tokens) > 15 or longer.tokens[-1] not in ends
    assert ends.isdisjoint(longer.tokens[:15])
    ignoring = driver.one(prompt, SamplingParams(max_tokens=14, ignore_eos=True))
    assert len(ignoring.tokens) == 14
    assert not ends.isdisjoint(ignoring.tokens)
    assert ignoring.reason is FinishReason.LENGTH


@pytest.mark.model
def test_the_context_length_ends_a_request(make_driver, tokenizer):
    driver = make_driver(max_model_len=24)
    prompt = tokenizer.encode("one two three four five six seven eight nine ten")
    result = driver.one(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    assert len(prompt) + len(result.tokens) == 24
    assert result.reason is FinishReason.LENGTH
