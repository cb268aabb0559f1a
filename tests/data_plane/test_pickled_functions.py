"""Collective RPC with a function instead of a name: only where the pool allows it, refused at both ends otherwise."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raycore
from raycore.client.blocking import BlockingClient
from raycore.codec import FrameEncoder
from raycore.errors import (
    CallTimeoutError,
    InvalidArgumentsError,
    PickleRefusedError,
    RemoteCallError,
    UnsendableResultError,
)
from raycore.messages import Call, CallResult
from raycore.operations import CollectiveRpcArguments
from raycore.sampling import SamplingParams
from tests.support.engine_process import Pool, client_of, echo_pool
from tests.support.raw_peer import RawPeer


@pytest.fixture(scope="module")
def open_pool() -> Iterator[Pool]:
    """Two ranks that take functions."""
    with echo_pool(2, allow_pickle=True) as running:
        yield running


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


async def test_a_function_gets_the_engine_and_runs_on_every_rank(open_pool: Pool) -> None:
    scale = 3
    async with client_of(open_pool) as client:
        answers = await client.operations.collective_rpc(
            method=lambda engine, amount, *, more: (engine.info.engine, scale * amount + more, os.getpid()), args=[5], kwargs={"more": 1}
        )
        assert [answer[:2] for answer in answers] == [["echo", 16]] * 2
        assert {answer[2] for answer in answers} == {engine.pid for engine in open_pool.engines}
        one = await client.call(
            "collective_rpc", rank=1, method=lambda engine, array: float(array.sum()) + len(engine.stats()), args=[np.ones(9)]
        )
        assert one > 9
        assert await client.call("collective_rpc", rank=0, method="echo", args=[1]) == {"args": [1], "kwargs": {}}


def test_the_blocking_client_sends_functions_too(open_pool: Pool) -> None:
    async def make() -> Any:
        client = open_pool.client()
        await client.start()
        return client

    with BlockingClient(make) as client:
        assert client.operations.collective_rpc(method=lambda engine: engine.has_work()) == [False, False]


def test_a_client_in_process_takes_functions_where_it_may() -> None:
    options: dict[str, Any] = {"multiprocess_mode": False, "asyncio_mode": False, "engine": "echo"}
    with raycore.make_client(allow_pickle=True, **options) as client:
        assert client.operations.collective_rpc(method=lambda engine, n: engine.info.vocab_size + n, args=[1]) == [258]
    with raycore.make_client(**options) as client, pytest.raises(PickleRefusedError):
        client.operations.collective_rpc(method=lambda engine: 1)


async def test_without_permission_a_client_refuses_before_it_sends(pool: Pool) -> None:
    async with client_of(pool) as client:
        for arguments in (
            {"method": lambda engine: 1},
            {"method": print},
            {"method": "f", "pickled": b"x"},
            {"method": object(), "pickled": b"x"},
        ):
            with pytest.raises(PickleRefusedError, match="allow_pickle"):
                await client.operations.collective_rpc(**arguments)
        for method in (None, 5, b"f", []):
            with pytest.raises(InvalidArgumentsError):
                await client.operations.collective_rpc(method=method)


async def test_without_permission_an_engine_unpickles_nothing(pool: Pool, tmp_path: Path) -> None:
    import cloudpickle

    bomb = cloudpickle.dumps(Marker(tmp_path / "unpickled"))
    with RawPeer(pool.engine.member, pool.name) as peer:
        peer.attach()
        arguments = CollectiveRpcArguments(method="f", pickled=bomb)
        peer.send(Call(1, "collective_rpc", FrameEncoder().encode_part(arguments)))  # type: ignore[arg-type]
        assert peer.item(CallResult).error.type == "PickleRefusedError"
    assert not (tmp_path / "unpickled").exists()


async def test_what_goes_wrong_with_a_function_is_typed_and_the_engine_goes_on(open_pool: Pool) -> None:
    def fails(engine: Any) -> None:
        message = f"on {engine.info.engine}"
        raise ZeroDivisionError(message)

    def fails_to_say_why(_engine: Any) -> None:
        class SilentError(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no text")

        raise SilentError

    async with client_of(open_pool) as client:
        with pytest.raises(RemoteCallError, match="on echo") as caught:
            await client.call("collective_rpc", rank=0, method=fails)
        assert (caught.value.remote_type, caught.value.rank, "fails" in caught.value.traceback) == ("ZeroDivisionError", 0, True)
        with pytest.raises(RemoteCallError, match="its text raised RuntimeError"):
            await client.call("collective_rpc", rank=0, method=fails_to_say_why)
        for function in (lambda _engine: object(), lambda _engine: {1: threading.Lock()}, lambda engine: engine):
            with pytest.raises(UnsendableResultError, match="cannot be sent"):
                await client.call("collective_rpc", rank=0, method=function)
        lock = threading.Lock()
        with pytest.raises(InvalidArgumentsError, match="pickle"):
            await client.call("collective_rpc", rank=0, method=lambda _engine: lock)
        with pytest.raises(InvalidArgumentsError, match="argument"):
            await client.call("collective_rpc", rank=0, method=lambda _engine: 1, args=[2])
        with pytest.raises(InvalidArgumentsError, match="cannot be sent"):
            await client.call("collective_rpc", rank=0, method=lambda _engine, _x: 1, args=[object()])
        with pytest.raises(CallTimeoutError):
            await client.call("collective_rpc", rank=0, method=lambda _engine: __import__("time").sleep(0.5), timeout_s=0.05)
        for pickled in (b"", b"garbage", b"\x80\x05N."):
            arguments = CollectiveRpcArguments(method="f", pickled=pickled)
            with RawPeer(open_pool.engine.member, open_pool.name) as peer:
                peer.attach()
                peer.send(Call(1, "collective_rpc", FrameEncoder().encode_part(arguments)))  # type: ignore[arg-type]
                expected = "InvalidArgumentsError" if pickled else "NotSupportedError"
                assert peer.item(CallResult).error.type == expected
        assert (await client.generate([1], SamplingParams(max_tokens=2)).collect()).token_ids == [1, 1]
