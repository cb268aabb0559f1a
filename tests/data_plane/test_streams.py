"""Requests between processes over ipc: exact, many at once, refused, aborted, left."""

from __future__ import annotations

import asyncio
import gc
import re
from typing import Any

import numpy as np
import pytest

from raycore.errors import ClientClosedError, DuplicateRequestError, InvalidRequestError, RaycoreError, UnknownRankError
from raycore.sampling import SamplingParams
from tests.support.engine_process import Pool, client_of, expected, is_empty
from tests.support.waiting import LIMIT_S, until

LONG = SamplingParams(max_tokens=1_000_000)


async def eventually_empty(client: Any) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not await is_empty(client):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (3, 1), (3, 10), (700, 5), (5, 700), (40_000, 3)])
async def test_a_stream_is_exact(pool: Pool, length: int, count: int) -> None:
    prompt = [(7 * i) % 31_999 for i in range(length)]
    prompt = [token if token != 256 else 257 for token in prompt]
    async with client_of(pool) as client:
        tokens: list[int] = []
        reasons = []
        async for output in client.generate(prompt, SamplingParams(max_tokens=count)):
            tokens += output.token_ids
            reasons.append(output.finish_reason)
            assert (output.rank, output.prompt_tokens, output.replayed, output.error) == (0, length, False, None)
    assert tokens == expected(prompt, count)
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) <= {None}


async def test_text_in_is_text_out_and_a_stop_string_is_left_out(pool: Pool) -> None:
    async with client_of(pool) as client:
        stream = client.generate("héllo wörld. ", SamplingParams(max_tokens=500, stop=("ld. h",)))
        output = await stream.collect()
    assert (output.text, output.finish_reason, output.stop_reason) == ("héllo wör", "stop", "ld. h")


async def test_a_stop_string_before_the_minimum_is_text(pool: Pool) -> None:
    async with client_of(pool) as client:
        output = await client.generate("abc", SamplingParams(max_tokens=50, stop=("b",), min_tokens=4)).collect()
    assert (output.text, output.token_ids, output.stop_reason) == ("abca", list(b"abcab"), "b")


async def test_256_streams_at_once_are_each_exact(pool: Pool) -> None:
    async def one(client: Any, number: int) -> None:
        prompt = [1000 + number, *range(number % 13 + 1)]
        count = number % 50 + 1
        output = await client.generate(prompt, SamplingParams(max_tokens=count)).collect()
        assert output.token_ids == expected(prompt, count)

    async with client_of(pool) as client:
        await asyncio.gather(*(one(client, number) for number in range(256)))
        assert client.in_flight() == 0


async def test_more_requests_than_a_batch_holds_are_all_served(pool: Pool) -> None:
    async with client_of(pool) as client:
        outputs = await asyncio.gather(*(client.generate([n], SamplingParams(max_tokens=2)).collect() for n in range(300, 1500)))
        assert [output.token_ids for output in outputs] == [[n, n] for n in range(300, 1500)]


async def test_outputs_gives_every_token_of_added_requests_once(pool: Pool) -> None:
    async with client_of(pool) as client:
        ids = {await client.add_request([n, n + 1], SamplingParams(max_tokens=20)): n for n in range(300, 340)}
        got: dict[str, list[int]] = {request_id: [] for request_id in ids}
        running = set(ids)
        while running:
            for output in await client.outputs():
                got[output.request_id] += output.token_ids
                if output.finish_reason:
                    running.remove(output.request_id)
    assert got == {request_id: expected([n, n + 1], 20) for request_id, n in ids.items()}


async def test_an_id_in_flight_is_refused_and_free_again_afterwards(pool: Pool) -> None:
    async with client_of(pool) as client:
        stream = client.generate([1], SamplingParams(max_tokens=50), request_id="mine")
        with pytest.raises(DuplicateRequestError) as caught:
            client.generate([2], request_id="mine")
        assert caught.value.request_id == "mine"
        assert len((await stream.collect()).token_ids) == 50
        assert (await client.generate([3], SamplingParams(max_tokens=1), request_id="mine").collect()).token_ids == [3]


async def test_two_clients_may_use_the_same_id_at_once(pool: Pool) -> None:
    async with client_of(pool) as one, client_of(pool) as two:
        streams = [client.generate([n], SamplingParams(max_tokens=30), request_id="same") for n, client in ((5, one), (6, two))]
        first, second = await asyncio.gather(*(stream.collect() for stream in streams))
    assert (first.token_ids, second.token_ids) == ([5] * 30, [6] * 30)


async def test_an_abort_mid_stream_ends_it_so_and_leaves_nothing_on_the_engine(pool: Pool) -> None:
    async with client_of(pool) as client:
        stream = client.generate([1, 2, 3], LONG, request_id="long")
        tokens = list((await anext(stream)).token_ids)
        await client.abort_requests(["long", "never seen", "long"])
        rest = [output async for output in stream]
        tokens += [token for output in rest for token in output.token_ids]
        assert rest[-1].finish_reason == "abort"
        assert tokens == expected([1, 2, 3], len(tokens))
        await eventually_empty(client)
        assert client.in_flight() == 0


async def test_an_abort_before_anything_was_sent_ends_the_stream(pool: Pool) -> None:
    async with client_of(pool) as client:
        stream = client.generate([1], LONG, request_id="x")
        await client.abort_requests(["x"])
        assert (await stream.collect()).finish_reason == "abort"
        await eventually_empty(client)


async def test_breaking_out_of_a_stream_aborts_it(pool: Pool) -> None:
    async with client_of(pool) as client:
        async for _ in client.generate([1], LONG):
            break
        gc.collect()
        await eventually_empty(client)


async def test_leaving_a_streams_context_or_closing_it_aborts_it(pool: Pool) -> None:
    async with client_of(pool) as client:
        async with client.generate([1], LONG) as stream:
            await anext(stream)
        other = client.generate([1], LONG)
        await other.aclose()
        assert [output async for output in other] == []
        await eventually_empty(client)


async def test_cancelling_a_reader_loses_nothing(pool: Pool) -> None:
    async with client_of(pool) as client:
        stream = client.generate([1, 2, 3], SamplingParams(max_tokens=300))
        tokens: list[int] = []
        for _ in range(50):
            try:
                tokens += (await asyncio.wait_for(anext(stream), 0.0005)).token_ids
            except (TimeoutError, StopAsyncIteration):
                continue
        async for output in stream:
            tokens += output.token_ids
    assert tokens == expected([1, 2, 3], 300)


async def test_a_stream_that_was_read_is_over(pool: Pool) -> None:
    async with client_of(pool) as client:
        stream = client.generate([1], SamplingParams(max_tokens=1))
        await stream.collect()
        with pytest.raises(RaycoreError):
            await stream.collect()


BAD_PROMPTS: list[Any] = [
    [], "", (), [32_000], [-1], [2**32], [1.5], ["a"], [None], None, 5, 1.0, object(), [[1]], np.zeros((2, 2), np.int64), [1] * (1 << 20),
    "\ud800", b"", {"prompt": 1}, [2**70],
]  # fmt: skip


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda value: repr(value)[:20].encode("ascii", "replace").decode())
async def test_a_prompt_that_cannot_be_served_is_refused_at_the_door(pool: Pool, prompt: Any) -> None:
    async with client_of(pool) as client:
        with pytest.raises(InvalidRequestError):
            client.generate(prompt)
        with pytest.raises(InvalidRequestError):
            await client.add_request(prompt)
        assert client.in_flight() == 0


@pytest.mark.parametrize("prompt", [np.array([5, 6], np.int64), np.array([5, 6], np.uint32), (5, 6), range(5, 7)], ids=repr)
async def test_any_sequence_of_token_ids_is_a_prompt(pool: Pool, prompt: Any) -> None:
    async with client_of(pool) as client:
        assert (await client.generate(prompt, SamplingParams(max_tokens=3)).collect()).token_ids == [5, 6, 5]


@pytest.mark.parametrize(
    "options",
    [
        {"request_id": ""},
        {"request_id": "x" * 257},
        {"request_id": 5},
        {"request_id": "\ud800"},
        {"sampling": "hot"},
        {"sampling": SamplingParams(max_tokens=0)},
        {"sampling": SamplingParams(max_tokens=2**70)},
        {"sampling": SamplingParams(top_k=2**70)},
        {"sampling": SamplingParams(stop=("\ud800",))},
        {"sampling": SamplingParams(stop_token_ids=(2**70,))},
        {"sampling": SamplingParams(temperature=10**400)},
        {"priority": 2**70},
        {"priority": "high"},
        {"priority": None},
        {"priority": 1.5},
        {"tensors": {"x": object()}},
        {"tensors": {"x": np.array([object()])}},
        {"tensors": {"big": np.zeros(1 << 20), "x": object()}},
        {"tensors": {1: np.zeros(3)}},
        {"tensors": [np.zeros(3)]},
        {"tensors": {"x": 2**70}},
        {"tensors": {"x": "\ud800"}},
    ],
    ids=lambda options: re.sub(" at 0x[0-9a-f]+", "", repr(options))[:50].encode("ascii", "replace").decode(),
)
async def test_options_that_cannot_be_sent_are_refused_and_disturb_nobody(pool: Pool, options: dict[str, Any]) -> None:
    async with client_of(pool) as client:
        good = client.generate([1, 2], SamplingParams(max_tokens=50))
        with pytest.raises(InvalidRequestError):
            await client.generate([1], **options).collect()
        output = await good.collect()
        assert (output.token_ids, output.replayed) == (expected([1, 2], 50), False)
        assert client.in_flight() == 0


@pytest.mark.parametrize("rank", [1, -1, 99, "0", 0.5])
async def test_a_rank_that_does_not_serve_is_refused(pool: Pool, rank: Any) -> None:
    async with client_of(pool) as client:
        with pytest.raises(UnknownRankError):
            client.generate([1], data_parallel_rank=rank)


async def test_a_client_that_leaves_mid_stream_takes_its_requests_along(pool: Pool) -> None:
    async with client_of(pool) as stays:
        async with client_of(pool) as leaves:
            streams = [leaves.generate([1], LONG) for _ in range(20)]
            await asyncio.gather(*(anext(stream) for stream in streams))
        for stream in streams:
            with pytest.raises(ClientClosedError):
                await stream.collect()
        await eventually_empty(stays)


async def test_a_closed_client_says_so_to_every_call(pool: Pool) -> None:
    client = pool.client()
    with pytest.raises(ClientClosedError):
        client.generate([1])
    await client.start()
    await client.aclose()
    await client.aclose()
    with pytest.raises(ClientClosedError):
        client.generate([1])
    for work in (client.add_request([1]), client.outputs(), client.abort_requests(["x"]), client.call("profile", rank=0)):
        with pytest.raises(ClientClosedError):
            await work


async def test_who_waits_for_outputs_learns_that_the_client_closed(pool: Pool) -> None:
    client = pool.client()
    await client.start()
    waiting = asyncio.create_task(client.outputs())
    calling = asyncio.create_task(client.call("collective_rpc", rank=0, method="sleep", args=[0.3]))
    await until(lambda: client.in_flight() == 0, "started")
    await asyncio.sleep(0)
    await client.aclose()
    for task in (waiting, calling):
        with pytest.raises(ClientClosedError):
            await asyncio.wait_for(task, LIMIT_S)


async def test_tables_do_not_grow_over_50_000_requests(pool: Pool) -> None:
    async with client_of(pool) as client:

        async def some(count: int) -> None:
            left = [count]

            async def worker() -> None:
                while left[0] > 0:
                    left[0] -= 1
                    await client.generate([1], SamplingParams(max_tokens=1)).collect()

            await asyncio.gather(*(worker() for _ in range(250)))

        await some(2_000)
        before = sizes_of(client)
        state = pool.engine.state()
        await some(48_000)
        grown = {name: (before.get(name, 0), size) for name, size in sizes_of(client).items() if size > before.get(name, 0) + 8}
        assert not grown
        assert pool.engine.state().known_peers == state.known_peers


def sizes_of(root: Any) -> dict[str, int]:
    """The length of every container below an object of ours."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()

    def look(value: Any, path: str, depth: int) -> None:
        if id(value) in seen or depth > 6:
            return
        seen.add(id(value))
        if isinstance(value, (list, dict, set, tuple)) or type(value).__name__ == "deque":
            sizes[path] = len(value)
            items = value.values() if isinstance(value, dict) else value
            for item in list(items)[:4]:
                look(item, f"{path}[]", depth + 1)
        elif type(value).__module__.startswith("raycore"):
            names = list(getattr(value, "__dict__", {})) + [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())]
            for name in names:
                look(getattr(value, name, None), f"{path}.{name}", depth + 1)

    look(root, "client", 0)
    return sizes
