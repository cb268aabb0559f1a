"""The client whose engine is stepped by the thread that waits."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from raycore.client.blocking import BlockingClient
from raycore.client.in_process import in_process_client
from raycore.config import Limits
from raycore.engine import FinishReason, StepOutput
from raycore.errors import (
    ClientClosedError,
    ConfigurationError,
    EngineDeadError,
    InvalidRequestError,
    NoEngineError,
    NotSupportedError,
    RemoteCallError,
)
from raycore.sampling import SamplingParams
from tests.support.scripted import ScriptedEngine


@pytest.fixture
def client() -> Iterator[BlockingClient]:
    with in_process_client(engine="echo") as running:
        yield running


def tokens_of(stream: Any) -> list[int]:
    return [token for output in stream for token in output.token_ids]


def test_streams_and_texts_are_those_of_an_engine_elsewhere(client: BlockingClient) -> None:
    assert tokens_of(client.generate([1, 2, 3], SamplingParams(max_tokens=7))) == [1, 2, 3, 1, 2, 3, 1]
    output = client.generate("abcdef", SamplingParams(max_tokens=40, stop=("fab",))).collect()
    assert (output.text, output.finish_reason, output.stop_reason) == ("abcde", "stop", "fab")


def test_several_streams_go_on_while_one_is_read(client: BlockingClient) -> None:
    streams = [client.generate([n], SamplingParams(max_tokens=30)) for n in range(20)]
    assert [stream.collect().token_ids for stream in reversed(streams)] == [[n] * 30 for n in reversed(range(20))]


def test_added_requests_come_through_outputs(client: BlockingClient) -> None:
    ids = client.add_requests([([n], SamplingParams(max_tokens=3)) for n in range(10)])
    got: dict[str, list[int]] = {request_id: [] for request_id in ids}
    while any(len(tokens) < 3 for tokens in got.values()):
        for output in client.outputs():
            got[output.request_id] += output.token_ids
    assert list(got.values()) == [[n] * 3 for n in range(10)]


def test_calls_are_answered(client: BlockingClient) -> None:
    assert client.operations.get_supported_tasks() == ("generate",)
    assert client.operations.collective_rpc(method="echo", args=[1]) == [{"args": [1], "kwargs": {}}]
    with pytest.raises(RemoteCallError):
        client.call("collective_rpc", rank=0, method="raise_error", args=["KeyError", "x"])
    assert client.operations.pause_scheduler(mode="keep") is None
    assert client.operations.is_scheduler_paused() is True
    client.operations.resume_scheduler()
    assert tokens_of(client.generate([5], SamplingParams(max_tokens=2))) == [5, 5]


@pytest.mark.parametrize("name", ["pause_scheduler", "sleep"])
def test_a_pause_that_waits_is_refused_since_nobody_would_step(client: BlockingClient, name: str) -> None:
    with pytest.raises(NotSupportedError, match="wait"):
        getattr(client.operations, name)(mode="wait")
    assert client.operations.is_scheduler_paused() is False


def test_bad_requests_are_refused_at_the_same_door(client: BlockingClient) -> None:
    for prompt in ([], [999_999], None, "\ud800"):
        with pytest.raises(InvalidRequestError):
            client.generate(prompt)  # type: ignore[arg-type]
    assert client.in_flight() == 0


def test_leaving_a_stream_aborts_it(client: BlockingClient) -> None:
    for _ in client.generate([1], SamplingParams(max_tokens=10_000)):
        break
    gc.collect()
    assert client.call("collective_rpc", rank=0, method="stats")["running"] == 0


def test_a_failing_step_is_the_death_of_the_engine_and_no_hang(client: BlockingClient) -> None:
    stream = client.generate([1], SamplingParams(max_tokens=10_000))
    next(stream)
    client.call("collective_rpc", rank=0, method="fail_at_step", args=[1])
    with pytest.raises(EngineDeadError, match="scheduled to fail"):
        stream.collect()
    for _ in range(2):
        with pytest.raises(NoEngineError, match="scheduled to fail"):
            client.generate([1])
    with pytest.raises(NoEngineError):
        client.operations.is_scheduler_paused()


def test_a_closed_client_says_so_and_closes_its_engine_once() -> None:
    engine = ScriptedEngine()
    client = in_process_client(engine_instance=engine)
    stream = client.generate([1], SamplingParams(max_tokens=100))
    next(stream)
    client.close()
    client.close()
    assert engine.is_closed
    for work in (lambda: client.generate([1]), client.outputs, lambda: next(stream), client.operations.is_scheduler_paused):
        with pytest.raises(ClientClosedError):
            work()


def test_a_thoughtful_caller_does_not_lose_its_session() -> None:
    with in_process_client(engine="echo", limits=Limits(lease_s=0.05)) as client:
        stream = client.generate([1, 2], SamplingParams(max_tokens=50))
        first = next(stream)
        time.sleep(0.3)  # the caller thinks, for six leases
        rest = stream.collect()
        assert first.token_ids + rest.token_ids == [1, 2] * 25
        assert not rest.replayed


def test_ctrl_c_in_a_step_leaves_the_client_usable_and_every_stream_whole() -> None:
    engine = ScriptedEngine()
    with in_process_client(engine_instance=engine) as client:
        other = client.generate([7, 8, 9], SamplingParams(max_tokens=60))
        stream = client.generate([1, 2, 3], SamplingParams(max_tokens=60))
        steps = [0]

        def interrupt() -> None:
            steps[0] += 1
            if steps[0] == 5:
                signal.raise_signal(signal.SIGINT)

        engine.before_step = interrupt  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            stream.collect()
        assert client.call("collective_rpc", rank=0, method="echo", args=[1])["args"] == [1]
        assert tokens_of(other) == [7, 8, 9] * 20
        assert tokens_of(client.generate([4], SamplingParams(max_tokens=2))) == [4, 4]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("moment", ["step", "load", "has_work"])
def test_ctrl_c_at_any_moment_of_a_step_loses_no_token(moment: str) -> None:
    engine = ScriptedEngine()
    method, calls = getattr(engine, moment), [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        answer = method(*args)
        if calls[0] == 12:
            signal.raise_signal(signal.SIGINT)
        return answer

    with in_process_client(engine_instance=engine) as client:
        stream = client.generate([1, 2, 3], SamplingParams(max_tokens=30))
        setattr(engine, moment, interrupted)
        got: list[int] = []
        try:
            for output in stream:
                got += output.token_ids
        except KeyboardInterrupt:
            for output in stream:
                got += output.token_ids
        assert calls[0] >= 12
        assert got == [1, 2, 3] * 10


def test_a_request_that_fails_with_its_last_token_raises_its_error_after_what_was_delivered() -> None:
    engine = ScriptedEngine()

    def fail() -> StepOutput:
        from raycore.engine import Detail

        return engine.end_all(FinishReason.ERROR, Detail(error_type="OutOfMemory", error_message="no blocks"))

    with in_process_client(engine_instance=engine) as client:
        engine.before_step = fail  # type: ignore[assignment]
        with pytest.raises(Exception, match="no blocks") as caught:
            client.generate([1]).collect()
        assert caught.value.remote_type == "OutOfMemory"  # type: ignore[attr-defined]


def test_configurations_that_cannot_be_are_refused() -> None:
    for values in ({"engine": "nobody"}, {"engine": "echo", "data_parallel_size": 2}, {"engine": "echo", "colour": 1}, {"engine": "torch"}):
        with pytest.raises(ConfigurationError):
            in_process_client(**values)
