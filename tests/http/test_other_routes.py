"""Models, embeddings, tokens, health, metrics, the API key, and the routes that change the pool."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest

from raycore.config import forwarded_environment
from raycore.engine import Detail, FinishReason, StepOutput
from raycore.errors import CapacityError, EngineDeadError, InvalidArgumentsError, NotSupportedError, ScalingBusyError, ScalingError
from raycore.http.adapters import AdapterNames
from tests.http.fronts import MODEL, Fixture, events_of, front_of
from tests.support.scripted import Rig, ScriptedEngine

ADMINISTRATION = ("/scale_elastic_ep", "/pause", "/resume", "/sleep", "/wake_up")
KEYED = ("/v1/models", "/version", "/is_scaling_elastic_ep", "/operations", "/operations/x", "/is_paused", "/is_sleeping")


def embedding_engine() -> ScriptedEngine:
    """Gives each prompt the vector [its length, its first token]."""
    engine = ScriptedEngine(tasks=("embed",))

    def step() -> StepOutput:
        requests, engine.requests = engine.requests, {}
        vectors = [np.array([len(r.prompt_token_ids), r.prompt_token_ids[0]], "<f4").tobytes() for r in requests.values()]
        details = [(handle, Detail(embedding=vector)) for handle, vector in zip(requests, vectors, strict=True)]
        ended = np.array(list(requests), np.uint32)
        return StepOutput(finished=ended, reasons=bytes([FinishReason.STOP]) * len(ended), details=details)

    engine.before_step = step
    return engine


async def test_models_name_the_one_that_is_served(front: Fixture) -> None:
    (model,) = (await front.ask("GET", "/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 4096)
    assert (await front.ask("GET", f"/v1/models/{MODEL}")).json() == model
    assert (await front.refusal("/v1/models/org/other", None, 404, "GET"))["code"] == "model_not_found"


async def test_adapters_are_models_as_long_as_they_are_loaded(front: Fixture) -> None:
    engine = front.rig.engine
    loaded = {"pirate": 1, "org/poet": 2}
    engine.methods |= {"lora_names": lambda: loaded, "add_lora": lambda **_adapter: True}
    models = (await front.ask("GET", "/v1/models")).json()["data"]
    assert [(model["id"], model["parent"]) for model in models] == [(MODEL, None), ("org/poet", MODEL), ("pirate", MODEL)]
    assert (await front.ask("GET", "/v1/models/org/poet")).json() == models[1]
    used: list[str | None] = []
    add = engine.add
    engine.add = lambda request: (used.append(request.lora), add(request))[1]
    for path, prompt in (
        ("/v1/completions", {"prompt": "abc"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        body = {**prompt, "model": "pirate", "max_tokens": 2}
        assert (await front.post(path, body)).json()["model"] == "pirate"
        assert events_of((await front.post(path, {**body, "stream": True})).text)[0]["model"] == "pirate"
        assert (await front.post(path, {**body, "model": MODEL, "lora": "org/poet"})).json()["model"] == MODEL
        assert (await front.post(path, {**body, "model": MODEL})).status_code == 200
        assert (await front.refusal(path, {**body, "lora": "org/poet"}))["param"] == "lora"
        assert "'scripted', 'org/poet', 'pirate'" in (await front.refusal(path, {**body, "model": "sailor"}, 404))["message"]
    assert used == ["pirate", "pirate", "org/poet", None] * 2


async def test_names_of_adapters_are_asked_once_a_second_and_those_that_every_rank_has() -> None:
    now_s, asked = [0.0], []
    answers: list[Any] = [{0: {"a": 1, "b": 2}, 1: {"a": 1}, 2: EngineDeadError("gone", rank=2, cause="killed")}]

    class Client:
        async def call_all(self, method: str, *, timeout_s: float) -> dict[int, Any]:
            asked.append((method, timeout_s))
            return answers[-1]

    client: Any = Client()
    names = AdapterNames(client, clock=lambda: now_s[0])
    assert await names.all() == await names.all() == {"a"}
    assert len(asked) == 1
    now_s[0] = 1.0
    answers.append({0: EngineDeadError("gone", rank=0, cause="killed")})
    assert await names.all() == {"a"}, "nobody answers: what was known last"
    now_s[0] = 2.0
    answers.append({0: NotSupportedError("no adapters", method="lora_names")})
    assert await names.all() == frozenset()


async def test_unknown_paths_and_methods_are_told_in_the_same_shape(front: Fixture) -> None:
    await front.refusal("/v2/completions", {}, 404)
    await front.refusal("/v1/completions/", {}, 404)
    await front.refusal("/v1/completions", None, 405, "GET")
    await front.refusal("/health", {}, 405)


@pytest.mark.parametrize("given", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]])
async def test_embeddings_come_as_numbers_or_base64(given: Any) -> None:
    async with front_of(Rig(embedding_engine())) as front:
        answer = (await front.post("/v1/embeddings", {"input": given, "model": MODEL})).json()
        assert answer["data"] == [{"object": "embedding", "index": 0, "embedding": [3.0, 97.0]}]
        assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        packed = (await front.post("/v1/embeddings", {"input": given, "encoding_format": "base64"})).json()["data"][0]["embedding"]
        assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == [3.0, 97.0]


async def test_wrong_embeddings_are_refused() -> None:
    async with front_of(Rig(embedding_engine())) as front:
        two = (await front.post("/v1/embeddings", {"input": ["a", "bc"], "dimensions": 2})).json()
        assert [row["embedding"] for row in two["data"]] == [[1.0, 97.0], [2.0, 98.0]]
        for wrong in ({}, {"input": []}, {"input": ""}, {"input": "a", "encoding_format": "hex"}, {"input": "a", "dimensions": 3}):
            await front.refusal("/v1/embeddings", wrong)
        await front.refusal("/v1/completions", {"prompt": "a"})


async def test_a_model_that_does_not_embed_says_so(front: Fixture) -> None:
    assert (await front.refusal("/v1/embeddings", {"input": "a"}))["code"] == "not_supported"


async def test_texts_become_tokens_and_come_back(front: Fixture) -> None:
    answer = (await front.post("/tokenize", {"prompt": "abc", "return_token_strs": True})).json()
    assert answer == {"count": 3, "max_model_len": 4096, "tokens": [97, 98, 99], "token_strs": ["a", "b", "c"]}
    chat = (await front.post("/tokenize", {"messages": [{"role": "user", "content": "abc"}]})).json()
    assert chat["tokens"] == [97, 98, 99]
    assert (await front.post("/detokenize", {"tokens": chat["tokens"]})).json() == {"prompt": "abc"}
    for wrong in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, {"prompt": 3}):
        await front.refusal("/tokenize", wrong)
    for wrong in ({}, {"tokens": ["a"]}, {"tokens": [1000]}, {"tokens": [-1]}, {"tokens": "abc"}):
        await front.refusal("/detokenize", wrong)


async def test_health_is_whether_a_rank_serves(front: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await front.ask("GET", "/health")).json() == {"status": "ok", "ranks": [0]}
    monkeypatch.setattr(front.client, "ranks", lambda: ())
    await front.refusal("/health", None, 503, "GET")


async def test_metrics_count_what_was_done(front: Fixture) -> None:
    await front.post("/v1/completions", {"prompt": "abc", "max_tokens": 2})
    await front.post("/v1/completions", {"prompt": "abc", "max_tokens": 0})
    text = (await front.ask("GET", "/metrics")).text
    for line in (
        'raycore_http_requests_total{code="200",replica="0",route="/v1/completions"} 1.0',
        'raycore_http_requests_total{code="400",replica="0",route="/v1/completions"} 1.0',
        'raycore_http_tokens_total{kind="prompt",replica="0"} 3.0',
        'raycore_http_tokens_total{kind="completion",replica="0"} 2.0',
        'raycore_http_time_to_first_token_seconds_count{replica="0"} 1.0',
        'raycore_http_in_flight{replica="0"} 1.0',
        'raycore_dp_size{pool="memory",replica="0"} 1.0',
        'raycore_requests_running{dp_rank="0",pool="memory",replica="0"} 0.0',
    ):
        assert line in text.splitlines()


async def test_metrics_and_health_answer_while_the_pool_scales(keyed: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling, may_end = asyncio.Event(), asyncio.Event()

    async def scale(_target: int) -> Any:
        scaling.set()
        await may_end.wait()
        raise ScalingError("undone")

    monkeypatch.setattr(keyed.controller, "scale", scale)
    keyed.headers["authorization"] = "Bearer right"
    task = asyncio.create_task(keyed.post("/scale_elastic_ep", {"new_data_parallel_size": 2}))
    await asyncio.wait_for(scaling.wait(), 20)
    assert (await keyed.ask("GET", "/metrics")).status_code == 200
    assert (await keyed.ask("GET", "/health")).status_code == 200
    assert (await keyed.post("/v1/completions", {"prompt": "abc"})).status_code == 200
    assert not task.done()
    may_end.set()
    assert (await task).json()["error"]["code"] == "pool_unavailable"


@pytest.mark.parametrize("path", ADMINISTRATION)
async def test_administration_is_closed_without_a_key(front: Fixture, path: str) -> None:
    assert (await front.refusal(path, {}, 403))["code"] == "administration_closed"
    assert not front.controller.sizes


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Bearer", "Basic right", "right", "Bearer \xe9", "Bearer rightx"])
async def test_without_the_right_key_nothing_but_health_and_metrics_answers(keyed: Fixture, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for method, path in (("POST", "/v1/completions"), *(("POST", path) for path in ADMINISTRATION), *(("GET", path) for path in KEYED)):
        answer = await keyed.http.request(method, path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert (await keyed.ask("GET", "/health")).status_code == 200
    assert (await keyed.ask("GET", "/metrics")).status_code == 200


async def test_with_the_key_everything_is_open(keyed: Fixture) -> None:
    keyed.headers["authorization"] = "bearer right"
    assert (await keyed.post("/v1/completions", {"prompt": "abc"})).status_code == 200
    assert (await keyed.ask("GET", "/version")).json()["version"]
    assert (await keyed.ask("GET", "/is_sleeping")).json() == {"is_sleeping": False}


async def test_scaling_waits_or_gives_an_operation(keyed: Fixture) -> None:
    keyed.headers["authorization"] = "Bearer right"
    assert (await keyed.post("/is_scaling_elastic_ep")).json() == {"is_scaling_elastic_ep": False}
    begun = await keyed.post("/scale_elastic_ep", {"new_data_parallel_size": 3, "wait": False})
    assert (begun.status_code, begun.json()) == (202, {"operation": "pool-1"})
    assert (await keyed.ask("GET", "/is_scaling_elastic_ep")).json() == {"is_scaling_elastic_ep": True}
    found = (await keyed.ask("GET", "/operations/pool-1")).json()
    assert (found["is_running"], found["phase"], found["target"]) == (True, "reserve", 3)
    done = (await keyed.post("/scale_elastic_ep", {"new_data_parallel_size": 2})).json()
    assert (done["operation"], done["ranks"], done["joined"]) == ("pool-1", [0, 1], [1])
    assert keyed.controller.sizes == [3, 2]
    assert (await keyed.ask("GET", "/operations/pool-1")).json()["is_running"] is False
    assert len((await keyed.ask("GET", "/operations")).json()["data"]) == 1
    assert (await keyed.refusal("/operations/other", None, 404, "GET"))["code"] == "operation_not_found"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ScalingBusyError("another runs", operation="pool-7"), 409),
        (CapacityError("2 CPUs are missing"), 503),
        (InvalidArgumentsError("must be an integer from 1 to 1024, not 0"), 400),
    ],
)
async def test_what_stops_scaling_is_told(keyed: Fixture, error: Exception, status: int) -> None:
    keyed.headers["authorization"] = "Bearer right"
    keyed.controller.error = error
    for wait in (True, False):
        told = await keyed.refusal("/scale_elastic_ep", {"new_data_parallel_size": 3, "wait": wait}, status)
        assert told["message"] == str(error)
    for wrong in ({}, {"new_data_parallel_size": "3"}, {"new_data_parallel_size": 2.5}, {"size": 3}):
        await keyed.refusal("/scale_elastic_ep", wrong)


async def test_pause_and_resume(keyed: Fixture) -> None:
    keyed.headers["authorization"] = "Bearer right"
    assert (await keyed.post("/pause?mode=keep&clear_cache=false")).json() == {"status": "paused"}
    assert (await keyed.ask("GET", "/is_paused")).json() == {"is_paused": True}
    waiting = asyncio.create_task(keyed.post("/v1/completions", {"prompt": "abc", "max_tokens": 1}))
    assert (await keyed.post("/resume")).json() == {"status": "resumed"}
    assert (await waiting).status_code == 200
    assert (await keyed.post("/pause", {"mode": "abort"})).status_code == 200
    assert (await keyed.post("/resume")).status_code == 200
    for wrong in ("/pause?mode=stop", "/pause?when=now", "/pause?clear_cache=perhaps", "/sleep?level=4", "/wake_up?tags=everything"):
        await keyed.refusal(wrong, None)


async def test_sleep_and_wake_up_on_an_engine_that_can(keyed: Fixture) -> None:
    keyed.headers["authorization"] = "Bearer right"
    assert (await keyed.refusal("/wake_up?tags=weights&tags=kv_cache", None, 409))["code"] == "engine_state"
    assert (await keyed.post("/sleep?level=0&mode=keep")).json() == {"status": "sleeping"}
    assert (await keyed.ask("GET", "/is_sleeping")).json() == {"is_sleeping": True}
    assert (await keyed.post("/wake_up")).json() == {"is_awake": True}
    assert (await keyed.refusal("/sleep", {"level": 1}))["code"] == "not_supported"


def test_the_key_is_never_forwarded_to_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCORE_API_KEY", "secret")
    monkeypatch.setenv("RAYCORE_OTHER", "plain")
    assert forwarded_environment(("RAYCORE_API_KEY", "RAYCORE_OTHER")) == {"RAYCORE_OTHER": "plain"}
