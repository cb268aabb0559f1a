"""Utility calls between processes: every operation, every way to end."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from raycore.errors import (
    CallTimeoutError,
    EngineStateError,
    InvalidArgumentsError,
    NotSupportedError,
    RemoteCallError,
    SessionLostError,
    UnknownOperationError,
    UnknownRankError,
    UtilityError,
)
from raycore.messages import Detach
from raycore.operations import OPERATIONS
from raycore.sampling import SamplingParams
from raycore.tensors import SHARED_MEMORY_DIRECTORY
from tests.support.engine_process import Pool, client_of, echo_pool, expected, is_empty
from tests.support.raw_peer import RawPeer
from tests.support.waiting import LIMIT_S, until

LONG = SamplingParams(max_tokens=1_000_000)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "add_lora": {"lora_id": 1, "name": "a", "path": "/a"},
    "remove_lora": {"lora_id": 1},
    "pin_lora": {"lora_id": 1},
    "save_sharded_state": {"path": "/a"},
    "collective_rpc": {"method": "echo"},
    "set_weight_version": {"version": "7"},
    "profile": {"start": True},
}
ANSWERED: dict[str, Any] = {
    "get_supported_tasks": ("generate",),
    "dp_engines_running": [False],
    "is_scheduler_paused": False,
    "pause_scheduler": None,
    "resume_scheduler": None,
    "execute_dummy_batch": [None],
    "is_sleeping": False,
    "reset_prefix_cache": True,
    "collective_rpc": [{"args": [], "kwargs": {}}],
    "profile": None,
}
"""What the echo engine can do; None: anything."""


async def resume(client: Any) -> None:
    await client.operations.resume_scheduler()


@pytest.mark.parametrize("name", sorted(OPERATIONS))
async def test_every_declared_operation_is_answered_or_refused_by_name(pool: Pool, name: str) -> None:
    async with client_of(pool) as client:
        work = getattr(client.operations, name)(**ARGUMENTS.get(name, {}))
        if name == "wake_up":
            with pytest.raises(EngineStateError, match="awake: there is nothing to wake up"):
                await work
        elif name in ANSWERED:
            answer = await work
            assert ANSWERED[name] is None or answer == ANSWERED[name]
        else:
            with pytest.raises(NotSupportedError, match=f"{name}.*echo") as caught:
                await work
            assert (caught.value.method, caught.value.rank) == (name, 0)
        if name == "profile":
            await client.operations.profile(start=False)
        await resume(client)
        assert (await client.generate([1], SamplingParams(max_tokens=2)).collect()).token_ids == [1, 1]


async def test_the_three_verbs_state_their_fan_out(pool: Pool) -> None:
    async with client_of(pool) as client:
        assert await client.call("is_scheduler_paused", rank=0) is False
        assert await client.call_all("is_scheduler_paused") == {0: False}
        assert await client.call_agree("is_scheduler_paused") is False
        assert await client.call_any("is_scheduler_paused") is False
        answers = await client.call_all("list_loras")
        assert isinstance(answers[0], NotSupportedError)
        with pytest.raises(NotSupportedError):
            await client.call_agree("list_loras")


async def test_what_was_never_declared_is_refused_before_it_is_sent(pool: Pool) -> None:
    async with client_of(pool) as client:
        for name in ("shutdown", "__class__", ""):
            with pytest.raises(UnknownOperationError):
                await client.call(name, rank=0)
        with pytest.raises(NotSupportedError, match="no RPC method '_answer'"):
            await client.call("collective_rpc", rank=0, method="_answer")
        with pytest.raises(UnknownRankError):
            await client.call("is_scheduler_paused", rank=3)


UNSENDABLE = [object(), 2**70, "\ud800", np.array([object()]), lambda: 1]


@pytest.mark.parametrize("value", UNSENDABLE, ids=lambda value: type(value).__name__)
async def test_arguments_that_cannot_be_sent_are_refused_and_leave_nothing(pool: Pool, value: Any) -> None:
    async with client_of(pool) as client:
        with pytest.raises(InvalidArgumentsError):
            await client.call("collective_rpc", rank=0, method="echo", args=[np.zeros(1 << 17), value])
        assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-*"))
        assert (await client.call("collective_rpc", rank=0, method="echo", args=[1]))["args"] == [1]


@pytest.mark.parametrize("values", [{"args": [1, 2, 3]}, {"kwargs": {"type_name": "ValueError"}}, {"kwargs": {"nobody": 1}}])
async def test_arguments_that_the_method_does_not_take_are_the_callers_error(pool: Pool, values: dict[str, Any]) -> None:
    async with client_of(pool) as client:
        with pytest.raises(InvalidArgumentsError):
            await client.call("collective_rpc", rank=0, method="raise_error", **values)


@pytest.mark.parametrize(
    "kind", ["ZeroDivisionError", "ValueError", "KeyError", "CapacityError", "StopIteration", "TimeoutError", "OSError"]
)
async def test_a_remote_error_keeps_type_text_method_rank_and_traceback(pool: Pool, kind: str) -> None:
    async with client_of(pool) as client:
        with pytest.raises(RemoteCallError) as caught:
            await client.call("collective_rpc", rank=0, method="raise_error", args=[kind, "what went wrong"])
    error = caught.value
    assert (error.remote_type, error.method, error.rank) == (kind, "collective_rpc", 0)
    assert "what went wrong" in str(error)
    assert "raise_error" in error.traceback


ARRAYS = [
    np.arange(10, dtype=np.int16),
    np.zeros((3, 0)),
    np.full((), 2, np.float32),
    np.arange(100_000).reshape(100, 1000)[::2, ::3],
    np.ones(1 << 21),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
async def test_arrays_go_there_and_back(pool: Pool, array: np.ndarray) -> None:
    async with client_of(pool) as client:
        answer = await client.call("collective_rpc", rank=0, method="echo", args=[array, "between", array], kwargs={"again": array})
    for got in (answer["args"][0], answer["args"][2], answer["kwargs"]["again"]):
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert np.array_equal(got, array)
    assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-*"))


async def test_where_there_is_no_shared_memory_tensors_go_as_frames(pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("raycore.tensors.SHARED_MEMORY_DIRECTORY", tmp_path / "none")
    array = np.arange(1 << 18)
    async with client_of(pool) as client:
        answer = await client.call("collective_rpc", rank=0, method="echo", args=[array])
        output = await client.generate([1], SamplingParams(max_tokens=2), tensors={"image": array}).collect()
    assert np.array_equal(answer["args"][0], array)
    assert output.token_ids == [1, 1]


async def test_requests_with_tensors_leave_no_file_whether_they_end_or_are_aborted(pool: Pool) -> None:
    async with client_of(pool) as client:
        for size in (10, 5_000, 1 << 18):
            array = np.zeros(size)
            streams = [client.generate([1], SamplingParams(max_tokens=3), tensors={"a": array, "b": [array]}) for _ in range(5)]
            aborted = client.generate([1], LONG, tensors={"a": array})
            await anext(aborted)
            await aborted.aclose()
            assert all(output.token_ids == [1] * 3 for output in await asyncio.gather(*(stream.collect() for stream in streams)))
        assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-*"))


async def test_256_calls_at_once_are_each_answered_with_their_own(pool: Pool) -> None:
    async with client_of(pool) as client:
        answers = await asyncio.gather(*(client.call("collective_rpc", rank=0, method="echo", args=[n]) for n in range(256)))
    assert [answer["args"] for answer in answers] == [[n] for n in range(256)]


async def test_a_call_past_its_deadline_is_a_timeout_and_its_late_reply_is_counted(pool: Pool) -> None:
    async with client_of(pool) as client:
        with pytest.raises(CallTimeoutError) as caught:
            await client.call("collective_rpc", rank=0, method="sleep", args=[0.3], timeout_s=0.05)
        assert (caught.value.method, caught.value.rank) == ("collective_rpc", 0)
        assert isinstance(caught.value, TimeoutError)
        await client.call("is_scheduler_paused", rank=0)
        assert late_replies(client) == 1


async def test_a_late_result_leaves_no_file(pool: Pool) -> None:
    async with client_of(pool) as client:
        busy = asyncio.create_task(client.call("collective_rpc", rank=0, method="sleep", args=[0.3]))
        with pytest.raises(CallTimeoutError):
            await client.call("collective_rpc", rank=0, method="echo", args=[np.zeros(1 << 18)], timeout_s=0.05)
        await busy
        await client.call("is_scheduler_paused", rank=0)
        assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-*"))


async def test_a_deadline_that_is_over_at_once_is_a_timeout_and_not_a_hang(pool: Pool) -> None:
    async with client_of(pool) as client:
        with pytest.raises(CallTimeoutError):
            await client.call("collective_rpc", rank=0, method="sleep", args=[0.1], timeout_s=1e-9)


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), 0.0, -1.0, "soon"], ids=repr)
async def test_a_deadline_that_is_no_positive_number_is_refused(pool: Pool, timeout_s: Any) -> None:
    async with client_of(pool) as client:
        with pytest.raises(UtilityError):
            await client.call("is_scheduler_paused", rank=0, timeout_s=timeout_s)
        assert await client.call("is_scheduler_paused", rank=0, timeout_s=5.0) is False


async def test_a_cancelled_call_is_forgotten_and_its_answer_dropped(pool: Pool) -> None:
    async with client_of(pool) as client:
        call = asyncio.create_task(client.call("collective_rpc", rank=0, method="sleep", args=[0.2]))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.call("is_scheduler_paused", rank=0)
        assert pending_calls(client) == 0


async def test_a_waiting_pause_past_its_deadline_is_undone(pool: Pool) -> None:
    async with client_of(pool) as client:
        running = client.generate([1, 2], LONG)
        await anext(running)
        with pytest.raises(CallTimeoutError):
            await client.operations.pause_scheduler(mode="wait", timeout_s=0.1)
        assert await client.operations.is_scheduler_paused() is False
        assert (await client.generate([5], SamplingParams(max_tokens=3)).collect()).token_ids == [5] * 3
        assert (await anext(running)).token_ids
        await running.aclose()
        while not await is_empty(client):
            await asyncio.sleep(0.01)


async def test_a_waiting_pause_whose_client_leaves_is_undone(pool: Pool) -> None:
    async with client_of(pool) as client, client.generate([1, 2], LONG) as running:
        await anext(running)
        async with pool.client() as other:
            left = asyncio.create_task(other.operations.pause_scheduler(mode="wait"))
            await wait_paused(client)
        await asyncio.gather(left, return_exceptions=True)
        assert (await asyncio.wait_for(client.generate([5], SamplingParams(max_tokens=3)).collect(), LIMIT_S)).token_ids == [5] * 3
        assert await client.operations.is_scheduler_paused() is False


async def wait_paused(client: Any) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not await client.operations.is_scheduler_paused():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
async def test_a_pause_holds_what_comes_and_resume_lets_it_go(pool: Pool, mode: str) -> None:
    async with client_of(pool) as client:
        running = client.generate([1, 2, 3], SamplingParams(max_tokens=150))
        first = (await anext(running)).token_ids
        await client.operations.pause_scheduler(mode=mode)
        held = client.generate([9], SamplingParams(max_tokens=2))
        assert await client.operations.is_scheduler_paused()
        assert await client.operations.dp_engines_running() == [True]
        await resume(client)
        assert (await held.collect()).token_ids == [9, 9]
        rest = await running.collect()
        got = first + rest.token_ids
        assert rest.finish_reason == ("abort" if mode == "abort" else "length")
        assert got == expected([1, 2, 3], len(got))
        assert mode == "abort" or len(got) == 150


async def test_calls_of_a_lost_session_fail_typed_and_its_requests_go_on(pool: Pool) -> None:
    async with client_of(pool) as client:
        stream = client.generate([1, 2, 3], SamplingParams(max_tokens=1500))
        tokens = list((await anext(stream)).token_ids)
        pause = asyncio.create_task(client.operations.pause_scheduler(mode="wait"))
        await wait_paused(client)
        await lose_session(client, pool)
        with pytest.raises(SessionLostError, match="pause_scheduler"):
            await asyncio.wait_for(pause, LIMIT_S)
        rest = await stream.collect()
        assert tokens + rest.token_ids == expected([1, 2, 3], 1500)
        assert rest.replayed


async def lose_session(client: Any, pool: Pool) -> None:
    """Another peer replaces this client's session on the engine, as after a fault on the way; its next frame tells the client."""
    (session,) = client._fleet.sessions()
    ended = pool.engine.state().ended_sessions
    with RawPeer(pool.engine.member, pool.name) as peer:
        peer.attach(replaces=session.id)
        await until(lambda: pool.engine.state().ended_sessions == ended + 1, "the session has ended")
        peer.send(Detach())
    with pytest.raises(SessionLostError):
        await asyncio.wait_for(client.call("is_scheduler_paused", rank=0), LIMIT_S)


def late_replies(client: Any) -> int:
    return client._calls.late_replies


def pending_calls(client: Any) -> int:
    return len(client._calls)


async def test_files_of_calls_of_one_rank_survive_the_end_of_requests_on_another() -> None:
    with echo_pool(2) as pool:
        async with client_of(pool) as client:
            busy = asyncio.create_task(client.call("collective_rpc", rank=1, method="sleep", args=[0.5]))
            array = np.arange(1 << 17)
            call = asyncio.create_task(client.call("collective_rpc", rank=1, method="echo", args=[array]))
            await asyncio.sleep(0)
            for _ in range(3):
                tensors = {"image": array}
                await client.generate([1], SamplingParams(max_tokens=1), data_parallel_rank=0, tensors=tensors).collect()
            assert not busy.done(), "rank 1 was meant to be busy still"
            assert np.array_equal((await call)["args"][0], array)
            await busy
        assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-*"))
