"""The asynchronous client on the in-memory channel: routing, lost frames, engines that leave."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from raycore.client.control import LOOP_ENDED
from raycore.client.in_process import NoControlPlane
from raycore.config import Limits
from raycore.engine import Detail, FinishReason, StepOutput
from raycore.errors import (
    AdmissionError,
    DisagreementError,
    EngineDeadError,
    InvalidRequestError,
    NoEngineError,
    RankLeftError,
    RaycoreError,
    RemoteCallError,
    RequestFailedError,
    SessionLostError,
    UnknownRankError,
)
from raycore.ids import EngineId, Epoch, Term
from raycore.membership import Departure, Membership, MemberState
from raycore.sampling import SamplingParams
from raycore.transport.channel import SendResult
from raycore.transport.memory import MemoryListener
from tests.support.scripted import POOL, Rig, ScriptedEngine, memory_client
from tests.support.waiting import until

LONG = SamplingParams(max_tokens=100_000)


def expected(prompt: list[int], count: int) -> list[int]:
    return [prompt[i % len(prompt)] for i in range(count)]


async def test_requests_spread_evenly_and_a_named_rank_is_honoured() -> None:
    rigs = [Rig(rank=rank) for rank in range(3)]
    async with memory_client(*rigs) as client:
        streams = [client.generate([1], LONG) for _ in range(30)]
        assert [[stream.rank for stream in streams].count(rank) for rank in range(3)] == [10, 10, 10]
        pinned = [client.generate([1], LONG, data_parallel_rank=2) for _ in range(3)]
        assert {stream.rank for stream in pinned} == {2}
        for stream in (*streams, *pinned):
            await stream.aclose()
        await until(lambda: client.in_flight() == 0, "all are aborted")
    assert not any(rig.engine.requests for rig in rigs)


async def test_an_engine_whose_slots_are_full_is_passed_over() -> None:
    rigs = [Rig(rank=rank) for rank in range(2)]
    async with memory_client(*rigs, limits=Limits(session_requests=2)) as client:
        big = client.generate([1], SamplingParams(max_tokens=50_000), data_parallel_rank=0)
        small = [client.generate([1], SamplingParams(max_tokens=5_000), data_parallel_rank=1) for _ in range(2)]
        third = client.generate([1], SamplingParams(max_tokens=5_000))
        assert third.rank == 0
        for rank in (None, 0, 1):
            with pytest.raises(AdmissionError):
                client.generate([1], data_parallel_rank=rank)
        for stream in (big, *small, third):
            await stream.aclose()
        await until(lambda: client.in_flight() == 0, "all are aborted")
        assert (await client.generate([1], SamplingParams(max_tokens=2)).collect()).token_ids == [1, 1]


async def test_an_engine_with_a_smaller_limit_refuses_and_loses_nothing() -> None:
    rig = Rig(limits=Limits(session_requests=2))
    async with memory_client(rig, limits=Limits()) as client:
        streams = [client.generate([n], SamplingParams(max_tokens=3)) for n in range(4)]
        answers = await asyncio.wait_for(asyncio.gather(*(stream.collect() for stream in streams), return_exceptions=True), 20)
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        assert len(errors) == 2
        assert client.in_flight() == 0


async def test_a_draining_engine_passes_new_work_on_and_finishes_its_own() -> None:
    rigs = [Rig(rank=rank) for rank in range(2)]
    async with memory_client(*rigs) as client:
        running = [client.generate([n], SamplingParams(max_tokens=300)) for n in range(10)]
        await asyncio.gather(*(anext(stream) for stream in running))
        rigs[0].core.stop(60.0)
        later = [client.generate([n], SamplingParams(max_tokens=5)) for n in range(10)]
        assert all(output.token_ids == [n] * 5 for n, output in enumerate(await asyncio.gather(*(s.collect() for s in later))))
        assert {stream.rank for stream in later} == {1}
        with pytest.raises(UnknownRankError):
            await asyncio.wait_for(client.generate([1], data_parallel_rank=0).collect(), 10)
        assert all(len(output.token_ids) >= 298 for output in await asyncio.gather(*(stream.collect() for stream in running)))


async def test_a_pinned_request_to_an_engine_that_drains_fails_typed_and_does_not_circle() -> None:
    rigs = [Rig(rank=rank) for rank in range(2)]
    async with memory_client(*rigs) as client:
        held = client.generate([1], LONG, data_parallel_rank=0)
        await anext(held)
        rigs[0].core.stop(60.0)
        with pytest.raises(UnknownRankError):
            await asyncio.wait_for(client.generate([1], LONG, data_parallel_rank=0).collect(), 10)
        await held.aclose()


async def test_a_membership_without_an_engine_ends_its_requests_with_the_cause() -> None:
    rigs = [Rig(rank=rank) for rank in range(2)]
    async with memory_client(*rigs) as client:
        streams = [client.generate([n], LONG) for n in range(6)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        call = asyncio.ensure_future(client.call("pause_scheduler", rank=0, mode="wait"))
        await asyncio.sleep(0)
        membership = Membership(POOL, Epoch(3), Term(1), (rigs[1].member,), (Departure(rigs[0].id, "lost its node"),))
        for rig in rigs:
            rig.core.set_membership(membership)
        answers = await asyncio.gather(*(s.collect() for s in streams if s.rank == 0), call, return_exceptions=True)
        assert {type(answer) for answer in answers} == {EngineDeadError}
        assert all("lost its node" in str(answer) for answer in answers)
        assert client.ranks() == (1,)
        assert client.in_flight() == 3
        for stream in streams:
            await stream.aclose()
        await until(lambda: client.in_flight() == 0, "all are over")


async def test_a_request_that_was_on_three_dying_engines_fails_alone() -> None:
    rigs = [Rig(rank=rank) for rank in range(4)]
    for rig in rigs:
        rig.engine.add_errors = {}

        def poison(engine: Any = rig.engine) -> None:
            if any(request.request_id == "poison" for request in engine.requests.values()):
                raise MemoryError

        rig.engine.before_step = poison
    async with memory_client(*rigs, on_engine_death="replay") as client:
        good = client.generate([1, 2, 3], SamplingParams(max_tokens=2000))
        await anext(good)
        with pytest.raises(EngineDeadError):
            await client.generate([6], request_id="poison").collect()
        assert len(client.ranks()) == 1
        assert (await good.collect()).finish_reason == "length"


async def test_embeddings_adapters_and_tensors_of_a_dead_engine_are_asked_for_again_as_they_were() -> None:
    facts = {"tasks": ("generate", "embed"), "embedding_size": 4}
    rigs = [Rig(ScriptedEngine(**facts), rank=rank) for rank in (0, 1)]
    embeds = np.arange(8, dtype=np.float32).reshape(2, 4)
    for rig in rigs:
        rig.engine.methods["add_lora"] = lambda **_arguments: True
        rig.engine.before_step = StepOutput
    async with memory_client(*rigs, on_engine_death="replay") as client:
        vectors = [asyncio.create_task(client.embed([7, 8])) for _ in range(2)]
        streams = [client.generate([5, 6], SamplingParams(max_tokens=3), lora="mine") for _ in range(2)]
        streams += [client.generate(None, SamplingParams(max_tokens=1), tensors={"prompt_embeds": embeds}) for _ in range(2)]
        await until(lambda: sum(len(rig.engine.requests) for rig in rigs) == 6, "all are there")
        died = {request.request_id: request for request in rigs[0].engine.requests.values()}
        assert died

        def die() -> StepOutput:
            raise MemoryError

        rigs[0].engine.before_step = die
        await until(lambda: len(rigs[1].engine.requests) == 6, "they are at the other rank")
        again = {request.request_id: request for request in rigs[1].engine.requests.values()}
        for request_id, request in died.items():
            copy = again[request_id]
            assert (copy.lora, copy.task, copy.sampling) == (request.lora, request.task, request.sampling)
            np.testing.assert_array_equal(copy.prompt_token_ids, request.prompt_token_ids)
            assert copy.tensors.keys() == request.tensors.keys()
            assert all(np.array_equal(copy.tensors[name], tensor) for name, tensor in request.tensors.items())
        assert {request.task for request in again.values()} == {"generate", "embed"}
        detail = Detail(embedding=np.ones(2, np.float32).tobytes())
        rigs[1].engine.before_step = lambda: rigs[1].engine.end_all(FinishReason.STOP, detail, with_token=False)
        for vector in await asyncio.gather(*vectors):
            np.testing.assert_array_equal(vector, np.ones(2, np.float32))
        for stream in streams:
            assert (await stream.collect()).finish_reason == "stop"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_a_function_that_wants_to_end_the_process_ends_its_call_only(error: BaseException) -> None:
    rig = Rig()

    def leave() -> None:
        raise error

    rig.engine.rpc["leave"] = leave
    async with memory_client(rig) as client:
        with pytest.raises(RemoteCallError, match=f"leave raised {type(error).__name__}"):
            await client.operations.collective_rpc(method="leave")
        assert (await client.generate([5], SamplingParams(max_tokens=2)).collect()).token_ids == [5, 5]


async def test_a_rank_that_hears_later_than_the_client_that_it_serves_again_is_used_again() -> None:
    rigs = [Rig(rank=rank) for rank in (0, 1)]
    async with memory_client(*rigs) as client:
        leaving = tuple(msgspec.structs.replace(rig.member, state=MemberState(rig.id.rank)) for rig in rigs)
        for rig in rigs:
            rig.core.set_membership(Membership(POOL, Epoch(3), Term(1), leaving))
        await until(lambda: client.membership.epoch == 3, "the client knows that rank 1 leaves")
        undone = Membership(POOL, Epoch(4), Term(1), tuple(rig.member for rig in rigs))
        rigs[0].core.set_membership(undone)
        await until(lambda: client.membership.epoch == 4, "the client knows that it does not")
        outputs = await asyncio.gather(*(client.generate([n], SamplingParams(max_tokens=2)).collect() for n in range(1, 5)))
        assert {output.rank for output in outputs} == {0}, "rank 1 has refused them"
        rigs[1].core.set_membership(undone)

        def is_used() -> bool:
            return len(client._fleet.usable) == 2

        await until(is_used, "rank 1 is used again")
        assert (await client.generate([5], SamplingParams(max_tokens=2), data_parallel_rank=1).collect()).token_ids == [5, 5]


async def test_true_is_no_rank() -> None:
    async with memory_client(Rig(), Rig(rank=1)) as client:
        with pytest.raises(UnknownRankError, match="True does not serve"):
            client.generate([5], data_parallel_rank=True)
        with pytest.raises(UnknownRankError, match="True does not serve"):
            await client.call("is_sleeping", rank=True)


async def test_an_error_of_the_engine_is_raised_after_what_was_delivered() -> None:
    rig = Rig()
    async with memory_client(rig) as client:
        stream = client.generate([5], LONG)
        added = await client.add_request([6], LONG)
        await anext(stream)
        rig.engine.before_step = lambda: rig.engine.end_all(FinishReason.ERROR, Detail(error_type="OutOfMemory", error_message="no blocks"))
        with pytest.raises(RequestFailedError, match="no blocks") as caught:
            await stream.collect()
        assert (caught.value.remote_type, caught.value.rank) == ("OutOfMemory", 0)
        outputs = []
        while not outputs or outputs[-1].error is None:
            outputs += [output for output in await client.outputs() if output.request_id == added]
        assert isinstance(outputs[-1].error, RequestFailedError)
        assert sum(output.error is not None for output in outputs) == 1


async def test_what_the_engine_refuses_is_refused_typed() -> None:
    rig = Rig()
    rig.engine.add_errors = {"odd": InvalidRequestError("too odd"), "broken": ZeroDivisionError("by zero")}
    async with memory_client(rig) as client:
        with pytest.raises(InvalidRequestError, match="too odd"):
            await client.generate([1], request_id="odd").collect()
        with pytest.raises(RequestFailedError, match="by zero") as caught:
            await client.generate([1], request_id="broken").collect()
        assert caught.value.remote_type == "ZeroDivisionError"


async def test_ranks_that_differ_are_told_apart() -> None:
    rigs = [Rig(rank=rank) for rank in range(3)]
    for rank, rig in enumerate(rigs):
        rig.engine.rpc["who"] = lambda rank=rank: min(rank, 1)
        rig.engine.rpc["fail"] = lambda rank=rank: 1 // rank
    async with memory_client(*rigs) as client:
        assert await client.call_all("collective_rpc", method="who") == {0: 0, 1: 1, 2: 1}
        assert await client.operations.collective_rpc(method="who") == [0, 1, 1]
        with pytest.raises(DisagreementError) as caught:
            await client.call_agree("collective_rpc", method="who")
        assert caught.value.results == {0: 0, 1: 1, 2: 1}
        answers = await client.call_all("collective_rpc", method="fail")
        assert isinstance(answers[0], RemoteCallError)
        assert (answers[1], answers[2]) == (1, 0)
        with pytest.raises(RemoteCallError) as error:
            await client.call_agree("collective_rpc", method="fail")
        assert error.value.rank == 0


async def test_the_last_engines_cause_is_told_to_whoever_comes_later() -> None:
    rig = Rig()
    async with memory_client(rig) as client:
        stream = client.generate([1], LONG)
        rig.engine.before_step = lambda: 1 // 0
        with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
            await stream.collect()
        with pytest.raises(NoEngineError, match="ZeroDivisionError"):
            client.generate([1])
        with pytest.raises((NoEngineError, UnknownRankError)):
            await client.call("is_scheduler_paused", rank=0)
        with pytest.raises(NoEngineError):
            await client.call_all("is_scheduler_paused")


class LossyListener(MemoryListener):
    """Loses the messages whose turn a test names, in each direction."""

    def __init__(self) -> None:
        super().__init__()
        self.lose_down: set[int] = set()
        self.lose_up: set[int] = set()
        self.lose_next_if: Callable[[], bool] = lambda: False
        self._down = self._up = 0

    def send(self, session: bytes, message: Any) -> Any:
        self._down += 1
        if self.lose_next_if():
            self.lose_next_if = lambda: False
            return SendResult.SENT
        if self._down in self.lose_down:
            return SendResult.SENT
        return super().send(session, message)

    def push(self, session: bytes, message: Any) -> None:
        self._up += 1
        if self._up not in self.lose_up:
            super().push(session, message)


def lossy_rig() -> tuple[Rig, LossyListener]:
    rig = Rig()
    listener = LossyListener()
    lossy = Rig(rig.engine)
    lossy.core._listener = listener
    lossy.core._sessions._listener = listener
    lossy.listener = listener
    return lossy, listener


@pytest.mark.parametrize("seed", range(6))
async def test_streams_are_exact_whichever_frames_are_lost(seed: int) -> None:
    generator = random.Random(seed)
    rig, listener = lossy_rig()
    listener.lose_down = {generator.randint(3, 150) for _ in range(3)}
    listener.lose_up = {generator.randint(3, 12)}
    # a lost frame is noticed at the next one; something is always said soon
    async with memory_client(rig, limits=Limits(lease_s=0.3)) as client:

        async def one(number: int) -> None:
            for round_ in range(4):
                prompt = [number, round_ + 1, 5]
                output = await client.generate(prompt, SamplingParams(max_tokens=60)).collect()
                assert output.token_ids == expected(prompt, 60), f"seed {seed}"

        await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(8))), 60)
        assert client.in_flight() == 0
    rig.turn()


async def test_a_call_whose_answer_is_lost_fails_and_is_not_sent_twice() -> None:
    rig, listener = lossy_rig()
    calls: list[int] = []
    rig.engine.rpc["count"] = lambda: calls.append(1)
    async with memory_client(rig, limits=Limits(lease_s=0.3)) as client:
        await client.call("is_scheduler_paused", rank=0)
        listener.lose_next_if = lambda: True
        with pytest.raises(SessionLostError, match="collective_rpc"):
            await asyncio.wait_for(client.call("collective_rpc", rank=0, method="count"), 20)
        assert calls == [1]
        await client.call("is_scheduler_paused", rank=0)


async def test_a_stream_whose_last_frame_is_lost_ends_all_the_same() -> None:
    rig, listener = lossy_rig()
    async with memory_client(rig, limits=Limits(lease_s=0.3)) as client:
        stream = client.generate([1, 2, 3], SamplingParams(max_tokens=40))
        tokens = list((await anext(stream)).token_ids)
        listener.lose_next_if = lambda: not rig.engine.requests
        rest = await asyncio.wait_for(stream.collect(), 20)
        assert tokens + rest.token_ids == expected([1, 2, 3], 40)


async def test_an_engine_of_another_life_is_dead_to_this_client() -> None:
    rig = Rig()
    stale = msgspec.structs.replace(rig.member, engine=msgspec.structs.replace(rig.member.engine, incarnation="before"))
    rig.member = stale
    rig.id = stale.engine
    with pytest.raises(EngineDeadError, match="refused"):
        async with memory_client(rig):
            pytest.fail("attached")


async def test_a_stream_that_was_closed_gives_nothing_more() -> None:
    rig = Rig()
    async with memory_client(rig) as client:
        stream = client.generate([1, 2, 3], SamplingParams(max_tokens=40))
        await anext(stream)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_second_reader_of_one_stream_is_refused() -> None:
    rig = Rig()
    async with memory_client(rig) as client:
        await client.call("pause_scheduler", rank=0, mode="keep")
        stream = client.generate([1, 2, 3], SamplingParams(max_tokens=4))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RaycoreError, match="has a reader already"):
            await anext(stream)
        await client.call("resume_scheduler", rank=0)
        assert (await first).token_ids


class _KnowsEnds(NoControlPlane):
    """A control plane whose notices are given by hand."""

    def __init__(self) -> None:
        self.on_end: dict[EngineId, Callable[[EngineId, str], None]] = {}
        self.newest: Membership | None = None

    def watch(self, engine: EngineId, on_death: Callable[[EngineId, str], None]) -> None:
        self.on_end[engine] = on_death

    async def refresh(self) -> Membership | None:
        return self.newest


@pytest.mark.parametrize("has_left", [True, False])
async def test_an_orderly_end_is_a_leave_where_the_newest_membership_says_so(has_left: bool) -> None:
    rigs = [Rig(rank=rank) for rank in range(2)]
    control = _KnowsEnds()
    async with memory_client(*rigs, control=control) as client:
        pinned = client.generate([1, 2], SamplingParams(max_tokens=20_000), data_parallel_rank=0)
        client.generate([5], SamplingParams(max_tokens=1), data_parallel_rank=1)
        free = next(s for s in (client.generate([1, 2], SamplingParams(max_tokens=20_000)) for _ in range(2)) if s.rank == 0)
        await asyncio.gather(anext(pinned), anext(free))
        if has_left:  # decided while this client did not read
            control.newest = Membership(POOL, Epoch(3), Term(1), (rigs[1].member,))
        control.on_end[rigs[0].id](rigs[0].id, LOOP_ENDED)
        if has_left:
            rest = await free.collect()
            assert (rest.finish_reason, rest.rank, rest.replayed) == ("length", 1, True)
        else:
            with pytest.raises(EngineDeadError, match=LOOP_ENDED):
                await free.collect()
        with pytest.raises(RankLeftError if has_left else EngineDeadError, match="rank 0"):
            await pinned.collect()
        assert client.ranks() == (1,)
