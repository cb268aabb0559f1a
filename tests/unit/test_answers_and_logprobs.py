"""Log probabilities and several answers to one request, in the asynchronous client on the in-memory channel."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import Any

import msgspec
import numpy as np
import pytest

from raycore.client.client import EngineCoreClient
from raycore.client.fan_out import FanOutStream
from raycore.client.journal import RequestOutput
from raycore.client.logprobs import TokenLogprob
from raycore.config import Limits
from raycore.errors import AdmissionError, DuplicateRequestError, InvalidRequestError, RaycoreError, RequestFailedError
from raycore.messages import StepColumns
from raycore.sampling import SamplingParams, child_seed
from tests.support.scripted import Rig, memory_client
from tests.support.waiting import until
from tests.unit.test_client_on_memory import expected, lossy_rig

PROMPT = [11, 12, 13]
THREE = SamplingParams(max_tokens=9, n=3, temperature=1.0, seed=7)
FOREVER = SamplingParams(max_tokens=100_000, n=3, temperature=1.0, seed=7)


def rows(tokens: list[int], places: range, width: int) -> list[TokenLogprob]:
    """What the scripted engine says of these tokens."""
    top = list(range(width))
    return [TokenLogprob(t, -p / 4, p + 1, top, [-float(i) for i in top]) for t, p in zip(tokens, places, strict=True)]


# -- log probabilities


@pytest.mark.parametrize("is_mailed", [False, True])
async def test_each_new_token_has_its_log_probability_and_the_prompts_come_first(is_mailed: bool) -> None:
    rig = Rig()
    params = SamplingParams(max_tokens=20, logprobs=2, prompt_logprobs=1)
    async with memory_client(rig) as client:
        silent = client.generate(PROMPT, SamplingParams(max_tokens=20))
        outputs = await mailed(client, params) if is_mailed else [output async for output in client.generate(PROMPT, params)]
        assert all(output.logprobs is None for output in [await silent.collect()])
    assert [row for output in outputs for row in output.logprobs or []] == rows(expected(PROMPT, 20), range(20), 2)
    assert all(len(output.logprobs or []) == len(output.token_ids) for output in outputs)
    assert outputs[0].prompt_logprobs == [None, *rows(PROMPT[1:], range(1, 3), 1)]
    assert all(output.prompt_logprobs is None for output in outputs[1:])


async def mailed(client: EngineCoreClient, params: SamplingParams) -> list[RequestOutput]:
    await client.add_request(PROMPT, params)
    outputs: list[RequestOutput] = []
    while not outputs or outputs[-1].finish_reason is None:
        outputs += await client.outputs()
    return outputs


async def test_collect_puts_log_probabilities_together() -> None:
    async with memory_client(Rig()) as client:
        output = await client.generate(PROMPT, SamplingParams(max_tokens=20, logprobs=0, prompt_logprobs=0)).collect()
        assert output.logprobs == rows(expected(PROMPT, 20), range(20), 0)
        assert output.prompt_logprobs == [None, *rows(PROMPT[1:], range(1, 3), 0)]
        one = await client.generate([5], SamplingParams(max_tokens=1, prompt_logprobs=3)).collect()
        assert (one.prompt_logprobs, one.logprobs) == ([None], None)


@pytest.mark.parametrize("seed", range(6))
async def test_log_probabilities_are_exact_whichever_frames_are_lost(seed: int) -> None:
    generator = random.Random(seed)
    rig, listener = lossy_rig()
    listener.lose_down = {generator.randint(3, 100) for _ in range(3)}
    listener.lose_up = {generator.randint(3, 12)}

    async def one(client: EngineCoreClient, number: int) -> None:
        prompt, params = [number, 4, 5], SamplingParams(max_tokens=40, logprobs=number % 3, prompt_logprobs=1)
        outputs = [output async for output in client.generate(prompt, params)]
        assert [row for output in outputs for row in output.logprobs or []] == rows(expected(prompt, 40), range(40), number % 3), seed
        told = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
        assert told == [[None, *rows(prompt[1:], range(1, 3), 1)]], seed

    async with memory_client(rig, limits=Limits(lease_s=0.3)) as client:
        await asyncio.wait_for(asyncio.gather(*(one(client, number) for number in range(8))), 60)


async def test_a_step_that_nobody_asked_of_carries_nothing_more() -> None:
    rig = Rig()
    one, two = rig.peer(), rig.peer()
    one.send(one.add(0, max_tokens=3))
    two.send(two.add(0, max_tokens=3, logprobs=1, prompt_logprobs=0))
    rig.finish()
    assert all(not item.logprobs for item in one.items(StepColumns))
    asked = [part for item in two.items(StepColumns) for part in item.logprobs]
    assert [part.of_prompt for part in asked] == [True, False, False, False]
    assert [np.frombuffer(part.slots, np.uint32).tolist() for part in asked] == [[0, 0], [0], [0], [0]]


def test_only_what_differs_from_the_defaults_travels() -> None:
    assert len(msgspec.msgpack.encode(SamplingParams())) == 3
    sampling = SamplingParams(logit_bias={5: 1.0}, n=2, min_p=0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling)) == {"logit_bias": {5: 1.0}, "n": 2, "min_p": 0.5}


# -- several answers


async def test_answers_are_requests_with_seeds_of_their_own_on_one_engine() -> None:
    rigs = [Rig(rank=rank) for rank in range(2)]
    seen: list[Any] = []
    for rig in rigs:
        rig.engine.before_step = lambda rig=rig: seen.extend((r.request_id, r.sampling, rig.id.rank) for r in rig.engine.requests.values())
    async with memory_client(*rigs) as client:
        params = SamplingParams(max_tokens=1, n=3, temperature=0.5, seed=7, prompt_logprobs=0)
        answers = await client.generate(PROMPT, params, request_id="p").collect_all()
        assert client.in_flight() == 0
    assert {name for name, _, _ in seen} == {"p/0", "p/1", "p/2"}
    assert len({rank for _, _, rank in seen}) == 1
    seeds = {name: sampling.seed for name, sampling, _ in seen}
    assert seeds == {f"p/{index}": child_seed(7, index) for index in range(3)}
    assert seeds["p/0"] == 7
    assert len(set(seeds.values())) == 3
    assert {sampling.n for _, sampling, _ in seen} == {1}
    assert [answer.prompt_logprobs is not None for answer in answers] == [True, False, False]


def test_child_seeds_are_what_they_were() -> None:
    assert [child_seed(7, index) for index in range(3)] == [7, 7643869921872156431, 3167967750878333780]
    assert all(0 <= child_seed(seed, index) < 2**63 for seed in (0, 2**63 - 1) for index in range(128))


async def test_generate_yields_every_answer_by_index_and_ends_with_the_last() -> None:
    async with memory_client(Rig()) as client:
        stream = client.generate(PROMPT, THREE, request_id="p")
        assert isinstance(stream, FanOutStream)
        assert (stream.request_id, stream.rank) == ("p", 0)
        outputs = [output async for output in stream]
        assert {output.request_id for output in outputs} == {"p"}
        for index in range(3):
            own = [output for output in outputs if output.index == index]
            assert [token for output in own for token in output.token_ids] == expected(PROMPT, 9)
            assert [output.finish_reason for output in own] == [None] * (len(own) - 1) + ["length"]
        assert stream.take() is None
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_text_of_every_answer_is_its_own() -> None:
    async with memory_client(Rig()) as client:
        answers = await client.generate("abc", SamplingParams(max_tokens=4, n=2, temperature=1.0)).collect_all()
        assert [(answer.index, answer.text) for answer in answers] == [(0, "abca"), (1, "abca")]
        only = await client.generate("abc", SamplingParams(max_tokens=2)).collect_all()
        assert [answer.text for answer in only] == ["ab"]


async def test_collect_of_several_answers_says_what_to_use() -> None:
    async with memory_client(Rig()) as client, client.generate(PROMPT, THREE) as stream:
        with pytest.raises(RaycoreError, match="collect_all"):
            await stream.collect()


@pytest.mark.parametrize("how", ["parent", "leave", "drop"])
async def test_the_end_of_the_parent_ends_every_answer(how: str) -> None:
    rig = Rig()
    async with memory_client(rig) as client:
        stream = client.generate(PROMPT, FOREVER, request_id="p")
        await anext(stream)
        if how == "parent":
            await client.abort_requests(["p", "unknown"])
            answers = await asyncio.wait_for(stream.collect_all(), 10)
            assert [answer.finish_reason for answer in answers] == ["abort"] * 3
        elif how == "leave":
            await stream.aclose()
        else:
            gc.disable()  # the last reference is enough
            del stream
        try:
            await until(lambda: client.in_flight() == 0, "all are aborted")
        finally:
            gc.enable()
        await until(lambda: not rig.engine.requests, "the engine has none of them")
        assert {entry for entry in rig.engine.log if entry[0] == "abort"} == {("abort", f"p/{index}") for index in range(3)}
        assert (await client.generate(PROMPT, THREE, request_id="p").collect_all())[2].token_ids == expected(PROMPT, 9)


async def test_one_answer_can_be_aborted_by_its_own_id() -> None:
    async with memory_client(Rig()) as client:
        stream = client.generate(PROMPT, SamplingParams(max_tokens=3000, n=3, temperature=1.0), request_id="p")
        await client.abort_requests(["p/1"])
        answers = await asyncio.wait_for(stream.collect_all(), 30)
        assert [answer.finish_reason for answer in answers] == ["length", "abort", "length"]


async def test_outputs_carry_the_parents_id_and_the_index() -> None:
    async with memory_client(Rig()) as client:
        assert await client.add_request(PROMPT, THREE, request_id="p") == "p"
        tokens: dict[int, list[int]] = {}
        ends = 0
        while ends < 3:
            for output in await client.outputs():
                assert output.request_id == "p"
                tokens.setdefault(output.index, []).extend(output.token_ids)
                ends += output.finish_reason is not None
        assert tokens == {index: expected(PROMPT, 9) for index in range(3)}


async def test_ids_of_answers_and_parents_in_flight_are_taken() -> None:
    async with memory_client(Rig()) as client:
        stream = client.generate(PROMPT, FOREVER, request_id="p")
        for name in ("p", "p/0", "p/2"):
            with pytest.raises(DuplicateRequestError, match=name):
                client.generate(PROMPT, request_id=name)
        with client_ids(client, "q/1"), pytest.raises(DuplicateRequestError, match="q/1"):
            client.generate(PROMPT, THREE, request_id="q")
        assert client.in_flight() == 4
        await client.abort_requests(["q", "q/1"])
        await stream.aclose()
        await until(lambda: client.in_flight() == 0, "all are aborted")


class client_ids:  # noqa: N801 -- a context
    """A request of this id is in flight."""

    def __init__(self, client: EngineCoreClient, name: str) -> None:
        self.stream = client.generate(PROMPT, SamplingParams(max_tokens=100_000), request_id=name)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


async def test_answers_that_do_not_all_fit_are_refused_together() -> None:
    async with memory_client(Rig(), limits=Limits(session_requests=4)) as client:
        first = client.generate(PROMPT, FOREVER)
        with pytest.raises(AdmissionError):
            client.generate(PROMPT, SamplingParams(n=2, temperature=1.0), request_id="p")
        assert client.in_flight() == 3
        await first.aclose()
        await until(lambda: client.in_flight() == 0, "all are aborted")
        assert len(await client.generate(PROMPT, SamplingParams(n=4, temperature=1.0), request_id="p").collect_all()) == 4


async def test_the_error_of_one_answer_is_raised_and_ends_the_others() -> None:
    rig = Rig()
    rig.engine.add_errors["p/1"] = ZeroDivisionError("by zero")
    async with memory_client(rig) as client:
        with pytest.raises(RequestFailedError, match="by zero"):
            await asyncio.wait_for(client.generate(PROMPT, FOREVER, request_id="p").collect_all(), 10)
        await until(lambda: client.in_flight() == 0, "the others are aborted")
    assert not rig.engine.requests


@pytest.mark.parametrize("seed", range(4))
async def test_answers_are_exact_whichever_frames_are_lost(seed: int) -> None:
    generator = random.Random(seed)
    rig, listener = lossy_rig()
    listener.lose_down = {generator.randint(3, 60) for _ in range(3)}
    async with memory_client(rig, limits=Limits(lease_s=0.3)) as client:
        params = SamplingParams(max_tokens=60, n=4, temperature=1.0, logprobs=0)
        streams = [client.generate([number, 5, 6], params) for number in range(3)]
        for number, stream in enumerate(streams):
            answers = await asyncio.wait_for(stream.collect_all(), 60)
            assert [a.token_ids for a in answers] == [expected([number, 5, 6], 60)] * 4, seed
            assert all(a.logprobs == rows(a.token_ids, range(60), 0) for a in answers), seed


async def test_a_dead_engines_answers_go_on_elsewhere() -> None:
    rigs = [Rig(rank=rank) for rank in range(2)]
    async with memory_client(*rigs, on_engine_death="replay") as client:
        stream = client.generate(PROMPT, SamplingParams(max_tokens=2000, n=3, temperature=1.0, logprobs=1))
        first = await anext(stream)
        rig = rigs[stream.rank]
        rig.engine.before_step = lambda: 1 / 0
        answers = await asyncio.wait_for(stream.collect_all(), 60)
        assert {answer.rank for answer in answers} == {1 - rig.id.rank}
        for answer in answers:
            seen = len(first.token_ids) if answer.index == first.index else 0
            assert answer.token_ids == expected(PROMPT, 2000)[seen:]
            assert answer.logprobs == rows(answer.token_ids, range(seen, 2000), 1)
            assert (answer.finish_reason, answer.replayed) == ("length", True)


# -- doors


async def test_an_engine_without_logits_is_refused_at_the_clients_door() -> None:
    from raycore.engines.echo import EchoEngine

    async with memory_client(Rig(EchoEngine())) as client:
        for name in ("logprobs", "prompt_logprobs"):
            with pytest.raises(InvalidRequestError, match=f"{name}: engine 'echo'"):
                client.generate(PROMPT, SamplingParams(**{name: 1}))
        with pytest.raises(InvalidRequestError, match="prompt_embeds: engine 'echo' takes token ids only"):
            client.generate(None, tensors={"prompt_embeds": np.zeros((2, 4), np.float32)})
        answers = await client.generate(PROMPT, THREE).collect_all()
        assert [answer.token_ids for answer in answers] == [expected(PROMPT, 9)] * 3
        assert client.in_flight() == 0


async def test_the_echo_engine_refuses_what_it_cannot_do_at_its_own_door() -> None:
    from raycore.engines.echo import EchoEngine

    rig = Rig(EchoEngine())
    peer = rig.peer()
    embeds = msgspec.structs.replace(peer.add(2, ()), tensors={"prompt_embeds": np.zeros((2, 4), np.float32)})
    peer.send(peer.add(0, logprobs=1), peer.add(1, prompt_logprobs=0), embeds)
    rig.finish()
    errors = {item.slot: item.error for item in peer.items() if hasattr(item, "error")}
    assert {slot: error.type for slot, error in errors.items()} == dict.fromkeys(range(3), "InvalidRequestError")
    assert all(name in errors[slot].message for slot, name in enumerate(("logprobs", "prompt_logprobs", "prompt_embeds")))


@pytest.mark.parametrize(
    ("prompt", "tensors", "text"),
    [
        (None, None, "the prompt is None"),
        (None, {"other": np.zeros(2)}, "the prompt is None"),
        (PROMPT, {"prompt_embeds": np.zeros((2, 4), np.float32)}, "not both"),
        (None, {"prompt_embeds": np.zeros((2, 5), np.float32)}, "shape"),
        (None, {"prompt_embeds": np.zeros((2, 4), np.int32)}, "floating point"),
        (None, {"prompt_embeds": np.full((2, 4), np.nan)}, "not finite"),
        (None, {"prompt_embeds": [[1.0] * 4]}, "floating point tensor, not list"),
        (None, {"prompt_embeds": np.zeros((4096, 4), np.float32)}, "at most 4096"),
        (PROMPT, 5, "tensors must be a dict"),
        (PROMPT, {5: np.zeros(2)}, "the name of a tensor must be text, not 5"),
        (PROMPT, {"\ud800": np.zeros(2)}, "the name of a tensor must be text"),
    ],
)
async def test_a_wrong_prompt_of_embeddings_is_refused_at_the_door(prompt: Any, tensors: Any, text: str) -> None:
    from tests.support.scripted import ScriptedEngine

    async with memory_client(Rig(ScriptedEngine(embedding_size=4))) as client:
        with pytest.raises(InvalidRequestError, match=text):
            client.generate(prompt, tensors=tensors)
        with pytest.raises(InvalidRequestError, match="prompt_logprobs needs"):
            client.generate(None, SamplingParams(prompt_logprobs=1), tensors={"prompt_embeds": np.zeros((2, 4), np.float32)})
        assert client.in_flight() == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lora": 2**63}, "lora is the name or the id"),
        ({"lora": -(2**70)}, "lora is the name or the id"),
        ({"lora": "\ud800"}, "lora is the name or the id"),
        ({"priority": True}, "priority must be an int32, not True"),
    ],
)
async def test_what_no_message_can_carry_is_refused_at_the_door_and_others_are_sent(options: Any, text: str) -> None:
    async with memory_client(Rig()) as client:
        other = client.generate(PROMPT, SamplingParams(max_tokens=2))
        with pytest.raises(InvalidRequestError, match=text):
            client.generate(PROMPT, SamplingParams(max_tokens=2), **options)
        assert len((await other.collect()).token_ids) == 2
        assert client.in_flight() == 0


async def test_a_biased_id_outside_the_vocabulary_is_refused_at_the_door() -> None:
    async with memory_client(Rig()) as client:
        for field, value in (("logit_bias", {1000: 1.0}), ("logit_bias", ((5, 1.0), (1000, 1.0))), ("stop_token_ids", (1000,))):
            with pytest.raises(InvalidRequestError, match=f"{field}: token id 1000"):
                client.generate(PROMPT, SamplingParams(**{field: value}))


async def test_a_bias_that_its_caller_changes_later_stays_as_it_was_sent() -> None:
    rig = Rig()
    async with memory_client(rig) as client:
        bias = {5: 1.0}
        stream = client.generate(PROMPT, SamplingParams(max_tokens=100_000, logit_bias=bias))
        bias[5] = float("nan")
        await anext(stream)
        assert [request.sampling.logit_bias for request in rig.engine.requests.values()] == [((5, 1.0),)]
        await stream.aclose()
        await until(lambda: client.in_flight() == 0, "it is aborted")
