"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.fronts import MODEL, Fixture, events_of

PATH = "/v1/chat/completions"


def body(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 7, "temperature": 0, **changes}


async def test_an_answer_is_a_message(front: Fixture) -> None:
    answer = (await front.post(PATH, body())).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"content": "hellohe", "role": "assistant", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


async def test_a_stream_says_what_the_whole_answer_says(front: Fixture) -> None:
    wanted = body(n=3, temperature=1, seed=1, logprobs=True, top_logprobs=2)
    whole = (await front.post(PATH, wanted)).json()
    *chunks, last = events_of((await front.post(PATH, {**wanted, "stream": True, "stream_options": {"include_usage": True}})).text)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for choice in whole["choices"]:
        parts = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert [part["delta"].get("role") for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
        assert [row for part in parts for row in part["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


async def test_log_probabilities_come_a_row_a_token(front: Fixture) -> None:
    choice = (await front.post(PATH, body(max_tokens=2, logprobs=True, top_logprobs=1))).json()["choices"][0]
    assert choice["logprobs"]["content"][1] == {
        "token": "e",
        "logprob": -0.25,
        "bytes": [101],
        "top_logprobs": [{"token": "\0", "logprob": 0.0, "bytes": [0]}],
    }


async def test_a_token_that_is_part_of_a_character_has_no_bytes(front: Fixture) -> None:
    wanted = body(messages=[{"role": "user", "content": "é"}], max_tokens=2, logprobs=True)
    choice = (await front.post(PATH, wanted)).json()["choices"][0]
    assert choice["message"]["content"] == "é"
    assert [row["bytes"] for row in choice["logprobs"]["content"]] == [None, None]


async def test_without_a_limit_an_answer_fills_the_context(front: Fixture) -> None:
    answer = (await front.post(PATH, body(max_tokens=None))).json()
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 4091, "total_tokens": 4096}


async def test_content_may_come_in_parts_and_the_system_has_two_names(front: Fixture) -> None:
    messages = [
        {"role": "developer", "content": "ab", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
    ]
    answer = (await front.post(PATH, body(messages=messages))).json()
    assert answer["choices"][0]["message"]["content"] == "ab\ncdab"


async def test_what_only_names_or_stores_a_request_is_taken(front: Fixture) -> None:
    named = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k", "tools": []}
    assert (await front.post(PATH, body(response_format={"type": "text"}, tool_choice="none", **named))).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{}]}, "messages.0.role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages.0.mood"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, None),
        ({"messages": [{"role": "user", "content": "x" * 4096}]}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"prompt": "x"}, "prompt"),
    ],
)
async def test_what_is_wrong_is_a_400_that_names_it(front: Fixture, changes: dict[str, Any], param: str | None) -> None:
    assert (await front.refusal(PATH, body(**changes)))["param"] == param


async def test_a_template_that_refuses_is_a_400(front: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_messages: Any) -> list[int]:
        raise RuntimeError("roles must alternate")

    monkeypatch.setattr(front.client.tokenizer, "apply_chat_template", refuse)
    assert "roles must alternate" in (await front.refusal(PATH, body()))["message"]


async def test_a_model_without_a_tokenizer_takes_no_chats(front: Fixture) -> None:
    front.client.tokenizer = None
    assert (await front.refusal(PATH, body()))["code"] == "not_supported"


async def test_a_long_chat_is_tokenised_beside_the_event_loop(front: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    threads: list[str] = []
    tokenizer = front.client.tokenizer
    assert tokenizer is not None
    encode = tokenizer.apply_chat_template

    def watched(messages: Any) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(messages)[:10]

    monkeypatch.setattr(tokenizer, "apply_chat_template", watched)
    for text in ("short", "long" * 2000):
        assert (await front.post(PATH, body(messages=[{"role": "user", "content": text}]))).status_code == 200
    assert threads[0] == "MainThread"
    assert threads[1] != "MainThread"
