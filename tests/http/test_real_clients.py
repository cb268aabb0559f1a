"""The front on a loopback port, asked by clients that no one here wrote: openai, curl and locust."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from raycore.http.server import HttpServer, bound_socket
from tests.http.fronts import MODEL, Fixture, front_of
from tests.http.test_other_routes import embedding_engine
from tests.support.scripted import Rig
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def served() -> AsyncIterator[tuple[Fixture, str]]:
    """A front behind uvicorn, with the key "right"."""
    async with front_of(Rig(), key="right") as front, HttpServer(front.app, bound_socket("127.0.0.1", 0)) as server:
        yield front, f"http://127.0.0.1:{server.port}"


def openai_client(url: str, **settings: object) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0, timeout=60, **settings)  # type: ignore[arg-type]


async def test_openai_completes_and_chats(served: tuple[Fixture, str]) -> None:
    async with openai_client(served[1]) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        done = await client.completions.create(model=MODEL, prompt="hello", max_tokens=7, temperature=0, logprobs=1)
        assert done.choices[0].text == "hellohe"
        assert done.choices[0].logprobs.tokens == list("hellohe")
        assert done.usage.total_tokens == 12
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            max_completion_tokens=7,
            n=2,
            seed=1,
            logprobs=True,
            top_logprobs=1,
        )
        assert [choice.message.content for choice in chat.choices] == ["hellohe"] * 2
        assert chat.choices[0].logprobs.content[1].logprob == -0.25


async def test_openai_streams(served: tuple[Fixture, str]) -> None:
    async with openai_client(served[1]) as client:
        wanted = {"model": MODEL, "max_tokens": 7, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.completions.create(prompt="hello", **wanted)]
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "hellohe"
        assert chunks[-1].usage.completion_tokens == 7
        talk = [{"role": "user", "content": "hello"}]
        deltas = [chunk async for chunk in await client.chat.completions.create(messages=talk, **wanted)]
        assert "".join(chunk.choices[0].delta.content for chunk in deltas[:-1]) == "hellohe"
        assert (deltas[0].choices[0].delta.role, deltas[-2].choices[0].finish_reason) == ("assistant", "length")


async def test_openai_embeds() -> None:
    async with (
        front_of(Rig(embedding_engine())) as front,
        HttpServer(front.app, bound_socket("127.0.0.1", 0)) as server,
        openai_client(f"http://127.0.0.1:{server.port}") as client,
    ):
        found = await client.embeddings.create(model=MODEL, input=["abc", "b"])
        assert [row.embedding for row in found.data] == [[3.0, 97.0], [1.0, 98.0]]


async def test_openai_knows_our_errors(served: tuple[Fixture, str], monkeypatch: pytest.MonkeyPatch) -> None:
    front, url = served
    async with openai_client(url) as client:
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.completions.create(model=MODEL, prompt="x", temperature=-1)
        assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_value")
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="gpt-5", prompt="x")
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        generate, refused = front.client.generate, []

        def refuse_once(*args: object, **options: object) -> object:
            from raycore.errors import OverloadedError

            if not refused:
                refused.append(1)
                raise OverloadedError("too much", retry_after_s=0.001)
            return generate(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(front.client, "generate", refuse_once)
        again = await client.with_options(max_retries=1).completions.create(model=MODEL, prompt="abc", max_tokens=3, temperature=0)
        assert (again.choices[0].text, refused) == ("abc", [1])  # it waited as long as it was told to and asked again


async def test_leaving_an_openai_stream_aborts_on_the_engine(served: tuple[Fixture, str]) -> None:
    front, url = served
    async with openai_client(url) as client:
        stream = await client.completions.create(model=MODEL, prompt="hello", max_tokens=4000, stream=True)
        async for _ in stream:
            break
        assert front.rig.engine.requests
        await stream.close()
        await until(lambda: not front.rig.engine.requests, "it is aborted")
    assert front.client.in_flight() == 0


async def test_a_connection_cut_before_the_answer_aborts_on_the_engine(served: tuple[Fixture, str]) -> None:
    front, url = served
    async with httpx.AsyncClient(base_url=url, headers={"authorization": "Bearer right"}) as http:
        task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4000}))
        await until(lambda: front.rig.engine.requests, "it runs")
        task.cancel()
        await until(lambda: not front.rig.engine.requests, "it is aborted")
    await asyncio.gather(task, return_exceptions=True)


async def run(*command: str, **environment: str) -> tuple[int, str, str]:
    """A command's exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, **environment}, cwd=ROOT
    )
    out, err = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_curl_gets_an_answer_a_stream_and_an_error(served: tuple[Fixture, str]) -> None:
    url = f"{served[1]}/v1/completions"
    key = ("-H", "Authorization: Bearer right", "-H", "Content-Type: application/json")
    code, out, _ = await run("curl", "-sS", "--fail", url, *key, "-d", '{"prompt": "hello", "max_tokens": 7, "temperature": 0}')
    assert (code, json.loads(out)["choices"][0]["text"]) == (0, "hellohe")
    code, out, _ = await run(
        "curl", "-sSN", "--fail", url, *key, "-d", '{"prompt": "hello", "max_tokens": 2, "temperature": 0, "stream": true}'
    )
    assert code == 0
    assert [line[:6] for line in out.splitlines() if line] == ["data: "] * 3
    assert out.endswith("data: [DONE]\n\n")
    code, out, _ = await run("curl", "-sS", "-w", "%{http_code}", url, *key, "-d", "{")
    assert out.endswith("400")
    code, out, _ = await run("curl", "-sS", "-w", "%{http_code}", url, "-d", "{}")
    assert out.endswith("401")


async def test_the_example_asks_through_openai(served: tuple[Fixture, str]) -> None:
    code, out, err = await run(sys.executable, "examples/openai_client.py", served[1], RAYCORE_API_KEY="right")
    assert code == 0, err
    first, *answers = out.splitlines()
    assert first == "What is the capital of France?Wh"
    assert answers == [f"{i}: {text!r} (length)" for i, text in enumerate(["The sea ", "The sea ", "The sky ", "The sky "])]


@pytest.mark.timeout(150)
async def test_locust_finds_nothing_wrong(served: tuple[Fixture, str]) -> None:
    front, url = served
    load = ("--headless", "--users", "8", "--spawn-rate", "8", "--run-time", "90s", "--json", "--loglevel", "WARNING")
    locust = (sys.executable, "-m", "locust", "-f", "bench/locustfile.py", "--host", url, *load)
    code, out, err = await run(*locust, RAYCORE_MODEL=MODEL, RAYCORE_API_KEY="right", RAYCORE_REQUESTS="100")
    assert code == 0, out + err
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["/v1/completions"]["num_requests"] >= 100
    assert rows["/v1/completions"]["num_failures"] == 0
    await until(lambda: not front.client.in_flight(), "nothing runs on")
