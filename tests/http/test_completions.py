"""POST /v1/completions: answers whole and streamed, their log probabilities, and everything that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from raycore.engine import Detail, FinishReason
from raycore.errors import OverloadedError
from tests.http.fronts import MODEL, Fixture, RawCall, events_of, front_of
from tests.support.scripted import Rig, ScriptedEngine
from tests.support.waiting import until

PATH = "/v1/completions"


def body(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hello", "max_tokens": 7, "temperature": 0, **changes}


async def test_an_answer_has_text_usage_and_finish_reason(front: Fixture) -> None:
    answer = (await front.post(PATH, body())).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "hellohe", "logprobs": None, "finish_reason": "length", "stop_reason": None}]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abcab"]),
        ([97, 98], ["ababa"]),
        (["a", "bc"], ["aaaaa", "bcbcb"]),
        ([[97], [98, 99]], ["aaaaa", "bcbcb"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_is_text_or_ids_or_a_list_of_either(front: Fixture, prompt: Any, texts: list[str], stream: bool) -> None:
    answer = await front.post(PATH, body(prompt=prompt, max_tokens=5, stream=stream))
    if not stream:
        assert [choice["text"] for choice in answer.json()["choices"]] == texts
        return
    found = [""] * len(texts)
    for chunk in events_of(answer.text):
        for choice in chunk["choices"]:
            found[choice["index"]] += choice["text"]
    assert found == texts


async def test_a_stream_says_what_the_whole_answer_says(front: Fixture) -> None:
    wanted = body(prompt=["hello", "you"], n=2, temperature=0.7, seed=5, logprobs=2, return_token_ids=True)
    whole = (await front.post(PATH, wanted)).json()
    streamed = await front.post(PATH, {**wanted, "stream": True, "stream_options": {"include_usage": True}})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(streamed.text)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [entry for part in parts for entry in part["logprobs"][column]] == choice["logprobs"][column]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]


async def test_chunks_have_no_usage_unless_it_is_asked_for(front: Fixture) -> None:
    chunks = events_of((await front.post(PATH, body(stream=True))).text)
    assert all("usage" not in chunk for chunk in chunks)


async def test_each_step_is_an_event_of_its_own(front: Fixture) -> None:
    chunks = events_of((await front.post(PATH, body(stream=True))).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == list("hellohe")


async def test_log_probabilities_come_as_columns(front: Fixture) -> None:
    choice = (await front.post(PATH, body(max_tokens=3, logprobs=1))).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == ["h", "e", "l"]
    assert choice["logprobs"]["token_logprobs"] == [0.0, -0.25, -0.5]
    assert choice["logprobs"]["top_logprobs"][1] == {"\0": 0.0, "e": -0.25}
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_gives_the_prompt_before_the_answer(front: Fixture, stream: bool) -> None:
    answer = await front.post(PATH, body(max_tokens=2, echo=True, logprobs=0, stream=stream))
    choices = [chunk["choices"][0] for chunk in events_of(answer.text)] if stream else answer.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "hellohe"
    columns = [choice["logprobs"] for choice in choices]
    assert [token for each in columns for token in each["tokens"]] == list("hellohe")
    assert [value for each in columns for value in each["token_logprobs"]] == [None, -0.25, -0.5, -0.75, -1.0, 0.0, -0.25]
    assert [at for each in columns for at in each["text_offset"]] == list(range(7))


async def test_what_stopped_an_answer_is_said(front: Fixture) -> None:
    front.rig.engine.before_step = lambda: front.rig.engine.end_all(FinishReason.STOP, Detail(stop_reason=7))
    choice = (await front.post(PATH, body(stop_token_ids=[7]))).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 7)


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": 5}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_value"),
        ({"prompt": [1.5]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [1 << 40]}, "prompt", "invalid_value"),
        ({"prompt": ["x"] * 3000}, "prompt", "invalid_value"),
        ({"prompt": [5000]}, None, "invalid_value"),
        ({"prompt": ""}, None, "invalid_value"),
        ({"prompt": [1] * 4096}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -3}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**30}, "max_tokens", "invalid_value"),
        ({"max_tokens": "7"}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"n": 2}, "n", "invalid_value"),  # of temperature 0
        ({"best_of": 3}, "best_of", "not_supported"),
        ({"suffix": "x"}, "suffix", "not_supported"),
        ({"seed": 1 << 63}, "seed", "invalid_value"),
        ({"seed": "x"}, "seed", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["x"] * 65}, "stop", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": -1}, "logprobs", "invalid_value"),
        ({"echo": True, "logprobs": 1, "n": 2, "temperature": 1}, "echo", "not_supported"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": "a"}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 1e9}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "invalid_value"),
        ({"min_tokens": 9}, "min_tokens", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include", "unknown_parameter"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"priority": 1 << 40}, None, "invalid_value"),
        ({"data_parallel_rank": 7}, None, "invalid_value"),
        ({"lora": ""}, None, "invalid_value"),
    ],
)
async def test_what_is_wrong_is_a_400_that_names_it(front: Fixture, changes: dict[str, Any], param: str | None, code: str) -> None:
    error = await front.refusal(PATH, body(**changes))
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert front.client.in_flight() == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"prompt"',
        b"\xff\xfe",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "a"} trailing',
    ],
)
async def test_a_body_that_is_no_request_is_a_400(front: Fixture, raw: bytes) -> None:
    await front.refusal(PATH, raw)


async def test_another_model_is_a_404(front: Fixture) -> None:
    assert (await front.refusal(PATH, body(model="gpt-5"), 404))["code"] == "model_not_found"


async def test_a_body_beyond_the_limit_is_refused() -> None:
    async with front_of(Rig(), max_body_bytes=1000) as front:
        assert (await front.refusal(PATH, body(prompt="x" * 1000), 413))["code"] == "body_too_large"
        assert (await front.post(PATH, body())).status_code == 200


async def test_too_much_load_is_a_429_that_says_when_to_come_back(front: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OverloadedError("as much waits as may", retry_after_s=2.2)

    monkeypatch.setattr(front.client, "generate", refuse)
    for stream in (False, True):
        answer = await front.post(PATH, body(stream=stream))
        assert answer.status_code == 429
        assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("3", "2200")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


async def test_an_engine_that_has_no_room_makes_a_stream_a_429_too() -> None:
    from raycore.config import Limits

    rig = Rig(limits=Limits(waiting_requests=1))
    engine = rig.engine
    async with front_of(rig) as front:
        engine.before_step = lambda: ScriptedEngine().step()  # nothing moves, so what is admitted waits
        first = front.client.generate([1])
        await until(lambda: engine.requests, "the first is there")
        answer = await front.post(PATH, body(stream=True))
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        await first.aclose()


@pytest.mark.parametrize("changes", [{"stream": True}, {}, {"prompt": ["a", "b"], "stream": True}, {"n": 3, "temperature": 1}])
async def test_a_caller_that_leaves_aborts_on_the_engine(front: Fixture, changes: dict[str, Any]) -> None:
    import asyncio

    call = RawCall()
    task = asyncio.create_task(call.run(front.app, PATH, body(max_tokens=4000, **changes)))
    await until(lambda: front.rig.engine.requests, "it runs")
    if changes.get("stream"):
        await asyncio.wait_for(call.has_begun.wait(), 20)
    call.left.set()
    await asyncio.wait_for(task, 20)
    await until(lambda: not front.rig.engine.requests, "it is aborted")
    assert front.client.in_flight() == 0
    assert 'code="499"' in (await front.ask("GET", "/metrics")).text


async def test_an_error_after_the_first_token_is_the_last_event(front: Fixture) -> None:
    engine = front.rig.engine

    def fail_at_the_third() -> Any:
        if engine.requests and max(engine.produced[handle] for handle in engine.requests) == 2:
            return engine.end_all(FinishReason.ERROR, Detail(error_type="ValueError", error_message="it broke"), with_token=False)
        return None

    engine.before_step = fail_at_the_third
    *chunks, last = events_of((await front.post(PATH, body(stream=True))).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "he"
    assert last["error"]["code"] == "request_failed"
    assert "it broke" in last["error"]["message"]
    assert (await front.post(PATH, body())).status_code == 500


async def test_a_failure_of_our_own_is_a_500_without_its_text(front: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(front.client, "generate", fail)
    answer = await front.post(PATH, body())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"
