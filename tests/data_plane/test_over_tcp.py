"""TCP under CURVE: the pool's clients are served as over ipc, and nobody else is let in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from raycore.config import Limits, Timeouts
from raycore.errors import DeadlineError, EngineDeadError
from raycore.messages import Attached, Detach
from raycore.sampling import SamplingParams
from raycore.tensors import SHARED_MEMORY_DIRECTORY
from raycore.transport.keys import curve_keys
from tests.support.engine_process import Pool, client_of, echo_pool, expected, is_empty
from tests.support.raw_peer import RawPeer
from tests.support.waiting import LIMIT_S, wait_until

NOT_LET_IN_S = 1.0
"""A good peer is answered in milliseconds."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with echo_pool(over_tcp=True, limits=Limits(disconnect_grace_s=0.2)) as running:
        yield running


async def test_streams_calls_and_tensors_are_as_over_ipc(pool: Pool) -> None:
    async with client_of(pool) as client:
        array = np.arange(1 << 18)
        streams = [client.generate([n, n + 1], SamplingParams(max_tokens=40), tensors={"x": array}) for n in range(300, 320)]
        outputs = await asyncio.gather(*(stream.collect() for stream in streams))
        assert [output.token_ids for output in outputs] == [expected([n, n + 1], 40) for n in range(300, 320)]
        answer = await client.call("collective_rpc", rank=0, method="echo", args=[array])
        assert np.array_equal(answer["args"][0], array)
        assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-*")), "over TCP tensors are frames"
        async with client.generate([1], SamplingParams(max_tokens=1_000_000)) as stream:
            await anext(stream)
        async with asyncio.timeout(20):
            while not await is_empty(client):
                await asyncio.sleep(0.01)


async def test_many_clients_at_once_are_served(pool: Pool) -> None:
    async def one(number: int) -> Any:
        async with client_of(pool) as client:
            return (await client.generate([number], SamplingParams(max_tokens=20)).collect()).token_ids

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number)) for number in range(300, 308)]
    assert [task.result() for task in tasks] == [[number] * 20 for number in range(300, 308)]


def test_the_right_keys_are_let_in(pool: Pool) -> None:
    assert is_let_in(
        pool, (pool.engine.member.endpoints.server_key, pool.access.client_public_key, pool.access.client_secret_key), is_expected=True
    )


def test_an_unknown_client_key_is_not_let_in(pool: Pool) -> None:
    assert not is_let_in(pool, (pool.engine.member.endpoints.server_key, *curve_keys()))


def test_a_public_key_without_its_secret_is_not_let_in(pool: Pool) -> None:
    assert not is_let_in(pool, (pool.engine.member.endpoints.server_key, pool.access.client_public_key, curve_keys()[1]))


def test_another_servers_key_is_not_let_in(pool: Pool) -> None:
    assert not is_let_in(pool, (curve_keys()[0], pool.access.client_public_key, pool.access.client_secret_key))


def test_no_key_is_not_let_in(pool: Pool) -> None:
    assert not is_let_in(pool, None)


def is_let_in(pool: Pool, keys: tuple[str, str, str] | None, *, is_expected: bool = False) -> bool:
    before = pool.engine.state()
    with RawPeer(pool.engine.member, pool.name, keys=keys, over_tcp=True) as peer:
        peer.attach()
        answered = peer.item(Attached, LIMIT_S if is_expected else NOT_LET_IN_S) is not None
        after = pool.engine.state()
        assert answered == (after.sessions == before.sessions + 1)
        assert after.bad_frames == before.bad_frames
        if answered:
            peer.send(Detach())
        wait_until(lambda: pool.engine.state().sessions == before.sessions, "nothing of it is left")
        return answered


@pytest.mark.parametrize("who", ["nobody", "a stranger"])
def test_beats_are_for_the_pool_only(pool: Pool, who: str) -> None:
    endpoints = pool.engine.member.endpoints
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger = 0
        socket.subscribe(b"")
        if who == "a stranger":
            socket.curve_serverkey = endpoints.server_key.encode()
            socket.curve_publickey, socket.curve_secretkey = (key.encode() for key in curve_keys())
        socket.connect(endpoints.beats_tcp)
        assert not socket.poll(int(NOT_LET_IN_S * 1000))


async def test_a_client_with_wrong_keys_fails_within_its_limit(pool: Pool) -> None:
    public, secret = curve_keys()
    access = msgspec.structs.replace(pool.access, client_public_key=public, client_secret_key=secret)
    stranger = Pool(pool.engines, access, use_tcp=True)
    with pytest.raises((DeadlineError, EngineDeadError)):
        async with stranger.client(timeouts=Timeouts(attach_s=1.0)):
            pytest.fail("let in")


def test_secrets_are_in_no_repr(pool: Pool) -> None:
    text = repr(pool.access) + repr(pool.engine.member)
    assert pool.access.client_secret_key not in text
