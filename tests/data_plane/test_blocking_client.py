"""The blocking façade over an engine in another process."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from raycore.client.blocking import BlockingClient
from raycore.client.client import EngineCoreClient
from raycore.errors import (
    CallTimeoutError,
    ClientClosedError,
    DuplicateRequestError,
    InvalidRequestError,
    NotSupportedError,
    RemoteCallError,
)
from raycore.sampling import SamplingParams
from tests.support.engine_process import Pool, expected
from tests.support.waiting import wait_until

LONG = SamplingParams(max_tokens=1_000_000)


def blocking(pool: Pool) -> BlockingClient:
    async def make() -> EngineCoreClient:
        client = pool.client()
        await client.start()
        return client

    return BlockingClient(make)


@pytest.fixture
def client(pool: Pool) -> Iterator[BlockingClient]:
    with blocking(pool) as running:
        yield running


def idle(pool: Pool) -> Callable[[], bool]:
    return lambda: pool.engine.state().requests == 0


def test_a_stream_is_a_plain_iterator(client: BlockingClient) -> None:
    tokens = [token for output in client.generate([1, 2, 3], SamplingParams(max_tokens=50)) for token in output.token_ids]
    assert tokens == expected([1, 2, 3], 50)
    assert client.generate("hi", SamplingParams(max_tokens=4)).collect().text == "hihi"


def test_outputs_gives_all_of_what_was_added(client: BlockingClient) -> None:
    ids = client.add_requests([([n], SamplingParams(max_tokens=5)) for n in range(300, 350)])
    got: dict[str, list[int]] = {request_id: [] for request_id in ids}
    ended: set[str] = set()
    while len(ended) < len(ids):
        for output in client.outputs():
            got[output.request_id] += output.token_ids
            if output.finish_reason:
                ended.add(output.request_id)
    assert list(got.values()) == [[n] * 5 for n in range(300, 350)]


def test_utility_calls_errors_and_facts_are_those_of_the_async_client(client: BlockingClient, pool: Pool) -> None:
    assert client.operations.is_scheduler_paused() is False
    assert client.call("is_scheduler_paused", rank=0) is False
    assert client.call_all("is_scheduler_paused") == {0: False}
    assert client.call_agree("get_supported_tasks") == ("generate",)
    array = np.arange(1 << 17)
    assert np.array_equal(client.call("collective_rpc", rank=0, method="echo", args=[array])["args"][0], array)
    with pytest.raises(NotSupportedError, match="sleep"):
        client.operations.sleep()
    with pytest.raises(RemoteCallError, match="why"):
        client.call("collective_rpc", rank=0, method="raise_error", args=["KeyError", "why"])
    with pytest.raises(CallTimeoutError):
        client.call("collective_rpc", rank=0, method="sleep", args=[0.2], timeout_s=0.01)
    with pytest.raises(InvalidRequestError):
        client.generate([])
    assert (client.pool, client.ranks(), client.in_flight(), client.info.engine) == (pool.name, (0,), 0, "echo")


def test_leaving_a_stream_aborts_it(client: BlockingClient, pool: Pool) -> None:
    for _ in client.generate([1], LONG):
        break
    with client.generate([1], LONG) as stream:
        next(stream)
    gc.collect()
    wait_until(idle(pool), "the engine has nothing left")


def test_an_id_in_flight_is_refused(client: BlockingClient) -> None:
    with client.generate([1], LONG, request_id="mine"), pytest.raises(DuplicateRequestError):
        client.generate([1], request_id="mine")


def test_many_threads_may_use_one_client(client: BlockingClient) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for count in range(1, 15):
            got = client.generate([number, 5], SamplingParams(max_tokens=count)).collect().token_ids
            if got != expected([number, 5], count) or client.operations.is_scheduler_paused():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(300 + number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_closing_frees_whoever_waits_in_another_thread(pool: Pool) -> None:
    client = blocking(pool)
    stream = client.generate([1], LONG)
    raised: list[BaseException] = []

    def wait(work: Callable[[], Any]) -> None:
        try:
            while True:
                work()
        except ClientClosedError as error:
            raised.append(error)

    works = (lambda: next(stream), client.outputs, lambda: client.call("is_scheduler_paused", rank=0))
    threads = [threading.Thread(target=wait, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    client.close()
    client.close()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    assert len(raised) == len(works)
    wait_until(idle(pool), "the engine has nothing left")
    for work in works:
        with pytest.raises(ClientClosedError):
            work()


def test_a_client_that_is_dropped_without_close_closes_itself(pool: Pool) -> None:
    before = pool.engine.state().sessions
    client = blocking(pool)
    stream = client.generate([1], LONG)
    next(stream)
    gone = weakref.ref(client)
    del client, stream
    gc.collect()
    assert gone() is None
    wait_until(lambda: pool.engine.state().sessions == before, "its session is over")
    wait_until(idle(pool), "its request is aborted")


def test_a_client_in_a_cycle_is_closed_even_when_the_collector_runs_in_its_own_thread(pool: Pool) -> None:
    before = pool.engine.state().sessions
    client = blocking(pool)
    loop = client._turner._loop  # type: ignore[attr-defined]
    holder: list[Any] = [client]
    holder.append(holder)
    gc.disable()
    try:
        del client, holder
        loop.call_soon_threadsafe(gc.collect)
        wait_until(lambda: pool.engine.state().sessions == before, "its session is over")
        wait_until(lambda: not any(thread.name.startswith("raycore-client") for thread in threading.enumerate()), "its thread has ended")
    finally:
        gc.enable()


def test_clients_come_and_go_without_a_trace(pool: Pool) -> None:
    def use() -> None:
        with blocking(pool) as client:
            client.generate([1], SamplingParams(max_tokens=2)).collect()

    use()
    me = psutil.Process()
    descriptors, threads = me.num_fds(), me.num_threads()
    for _ in range(5):
        use()
    wait_until(lambda: me.num_fds() <= descriptors, "descriptors are closed")
    wait_until(lambda: me.num_threads() <= threads, "threads have ended")


def test_a_start_that_fails_leaves_no_thread(pool: Pool) -> None:
    async def make() -> EngineCoreClient:
        raise ZeroDivisionError

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        BlockingClient(make)
    assert threading.active_count() == threads
