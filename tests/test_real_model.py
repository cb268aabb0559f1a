"""SmolLM2 on every client kind: the real path from a question to its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from safetensors import safe_open

import raycore
from raycore.client.blocking import BlockingClient
from raycore.client.client import EngineCoreClient
from raycore.demo import default_model
from raycore.errors import InvalidRequestError

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
GREEDY = raycore.SamplingParams(max_tokens=24)
OPTIONS = {"threads": 1, "kv_tokens": 8192}


@pytest.fixture(scope="module")
def model() -> str:
    return default_model()


@pytest.fixture(scope="module")
def in_process(model: str) -> Iterator[BlockingClient]:
    with raycore.make_client(multiprocess_mode=False, asyncio_mode=False, engine="torch", model=model, engine_options=OPTIONS) as client:
        yield client


async def answer_of(client: EngineCoreClient, rank: int) -> str:
    prompt = client.chat_prompt(QUESTION)
    return (await client.generate(prompt, GREEDY, data_parallel_rank=rank, detokenize=True).collect()).text


def test_an_engine_in_process_answers(in_process: BlockingClient) -> None:
    prompt = in_process.chat_prompt(QUESTION)
    assert in_process.generate(prompt, GREEDY, detokenize=True).collect().text == ANSWER


def test_a_stop_string_ends_the_text_before_it(in_process: BlockingClient) -> None:
    prompt = in_process.chat_prompt(QUESTION)
    sampling = raycore.SamplingParams(max_tokens=24, stop=(" is Par",))
    output = in_process.generate(prompt, sampling, detokenize=True).collect()
    assert (output.text, output.finish_reason, output.stop_reason) == ("The capital of France", "stop", " is Par")


def test_streamed_text_is_the_whole_text(in_process: BlockingClient) -> None:
    prompt = in_process.chat_prompt(QUESTION)
    assert "".join(output.text for output in in_process.generate(prompt, GREEDY, detokenize=True)) == ANSWER


def test_a_prompt_over_the_context_is_refused_at_the_door(in_process: BlockingClient) -> None:
    with pytest.raises(InvalidRequestError, match="context"):
        in_process.generate([1] * (in_process.info.max_model_len + 1), GREEDY)


def test_answers_share_one_computation_of_the_prompt_and_carry_log_probabilities(in_process: BlockingClient) -> None:
    prompt = in_process.chat_prompt(QUESTION)
    sampling = raycore.SamplingParams(max_tokens=6, n=3, temperature=1.0, seed=4, logprobs=2, prompt_logprobs=0)
    in_process.operations.reset_prefix_cache()
    before = stats_of(in_process)
    answers = in_process.generate(prompt, sampling, detokenize=True).collect_all()
    after = stats_of(in_process)
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert after["prefix_hit_tokens"] - before["prefix_hit_tokens"] == 2 * ((len(prompt) - 1) // 16 * 16)
    for answer in answers:
        assert answer.text
        assert [entry.token_id for entry in answer.logprobs or []] == answer.token_ids
        assert all(len(entry.top_ids) == 2 and entry.logprob <= 0 for entry in answer.logprobs or [])
    assert len({tuple(answer.token_ids) for answer in answers}) > 1
    told = answers[0].prompt_logprobs
    assert told is not None
    assert told[0] is None
    assert [entry.token_id for entry in told[1:] if entry is not None] == prompt[1:]
    first = in_process.generate(prompt, msgspec.structs.replace(sampling, n=1), detokenize=True).collect()
    assert first.token_ids == answers[0].token_ids


def stats_of(client: BlockingClient) -> dict[str, int]:
    (stats,) = client.call_all("collective_rpc", method="kv_cache_stats").values()
    return stats


def test_an_abort_of_the_request_ends_every_answer_and_leaves_no_block(in_process: BlockingClient) -> None:
    sampling = raycore.SamplingParams(max_tokens=200, n=4, temperature=1.0, ignore_eos=True)
    stream = in_process.generate(in_process.chat_prompt(QUESTION), sampling, request_id="parent")
    assert next(stream).token_ids
    in_process.abort_requests(["parent"])
    assert [answer.finish_reason for answer in stream.collect_all()] == ["abort"] * 4
    assert in_process.in_flight() == 0
    assert stats_of(in_process)["blocks_held"] == 0


def test_a_prompt_of_embeddings_says_what_its_tokens_say(in_process: BlockingClient, model: str) -> None:
    prompt = in_process.chat_prompt(QUESTION)
    with safe_open(Path(model) / "model.safetensors", "pt") as weights:
        embeds = weights.get_tensor("model.embed_tokens.weight")[prompt]
    output = in_process.generate(None, GREEDY, tensors={"prompt_embeds": embeds}, detokenize=True).collect()
    assert (output.text, output.prompt_tokens) == (ANSWER, len(prompt))
    with pytest.raises(InvalidRequestError, match="shape"):
        in_process.generate(None, GREEDY, tensors={"prompt_embeds": embeds[:, 1:]})


def test_a_profile_is_a_trace_of_torch_operators(in_process: BlockingClient, tmp_path: Path) -> None:
    (path,) = in_process.operations.profile(start=True, prefix="real", directory=str(tmp_path))
    in_process.generate(in_process.chat_prompt(QUESTION), raycore.SamplingParams(max_tokens=2)).collect()
    assert in_process.operations.profile(start=False) == [path]
    names = {event.get("name") for event in json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]}
    assert any("aten::" in str(name) for name in names)


@pytest.mark.ray
async def test_two_engine_cores_answer_async_and_blocking_clients(cluster: str, model: str) -> None:
    async with raycore.launch(pool="real", engine="torch", model=model, data_parallel_size=2, engine_options=OPTIONS) as client:
        assert await asyncio.gather(answer_of(client, 0), answer_of(client, 1)) == [ANSWER, ANSWER]
        assert await client.operations.get_supported_tasks() == ("generate",)
        assert await asyncio.to_thread(ask_blocking) == ANSWER
        checksums = await client.call_all("collective_rpc", method="weight_checksum")
        assert len(set(checksums.values())) == 1


def ask_blocking() -> str:
    with raycore.connect("real") as client:
        return client.generate(client.chat_prompt(QUESTION), GREEDY, detokenize=True).collect().text
