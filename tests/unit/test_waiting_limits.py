"""How much may wait: at an engine, of one client, in the client; who is refused, who never is, and when to come again."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest

from raycore.client.in_flight import InFlight
from raycore.client.journal import RequestRecord
from raycore.config import MAY_BE_NONE, Limits, parse_config
from raycore.core.sessions import Session
from raycore.core.waiting_room import Rate, WaitingRoom
from raycore.engine import EMPTY, FinishReason
from raycore.errors import AdmissionError, ConfigurationError, OverloadedError
from raycore.ids import RequestId, SessionId
from raycore.messages import Attach, Refused
from raycore.sampling import SamplingParams
from tests.support.scripted import Rig, memory_client
from tests.support.waiting import until

NONE = Limits(**dict.fromkeys(MAY_BE_NONE))
LONG = SamplingParams(max_tokens=100_000)


def limits(**changes: int | None) -> Limits:
    return msgspec.structs.replace(NONE, **changes)


def hold(rig: Rig, peer: Any) -> None:
    peer.send(peer.call(1, "pause_scheduler", mode="keep"))
    rig.turn()


def refused(peer: Any) -> dict[int, Any]:
    return {item.slot: item.error for item in peer.items(Refused)}


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"waiting_requests": 3}, "this engine has 3 requests waiting; 3 may"),
        ({"client_waiting_requests": 3}, "this client has 3 requests waiting"),
        ({"waiting_tokens": 31}, "this engine has 30 prompt tokens waiting; 31 may"),
        ({"client_waiting_tokens": 31}, "this client has 30 prompt tokens waiting"),
    ],
)
def test_what_is_too_much_is_refused_with_a_hint_and_the_rest_is_served(setting: dict[str, int], text: str) -> None:
    rig = Rig(limits=limits(**setting))
    peer = rig.peer()
    hold(rig, peer)
    peer.send(*(peer.add(slot, [1] * 10, max_tokens=2) for slot in range(6)))
    rig.turn()
    errors = refused(peer)
    assert set(errors) == {3, 4, 5}
    assert {error.type for error in errors.values()} == {"OverloadedError"}
    assert all(text in error.message and error.retry_after_s == 1.0 for error in errors.values())
    peer.send(peer.call(2, "resume_scheduler"))
    rig.turn()
    peer.send(peer.add(4, max_tokens=1))
    rig.finish()
    peer.frames()
    assert peer.ended == dict.fromkeys((0, 1, 2, 4), FinishReason.LENGTH)


def test_running_requests_do_not_wait_and_are_not_counted() -> None:
    rig = Rig(limits=limits(waiting_requests=2))
    peer = rig.peer()
    for slot in range(20):
        peer.send(peer.add(slot, max_tokens=100))
        rig.turn()
    assert not refused(peer)
    assert len(rig.engine.requests) == 20


def test_a_clients_limit_is_its_own_and_the_engines_is_everybodys() -> None:
    rig = Rig(limits=limits(client_waiting_requests=2, waiting_requests=3))
    one, two = rig.peer(), rig.peer()
    hold(rig, one)
    one.send(*(one.add(slot) for slot in range(3)))
    two.send(*(two.add(slot) for slot in range(3)))
    rig.turn()
    assert "this client" in refused(one)[2].message
    assert {slot: "this engine" in error.message for slot, error in refused(two).items()} == {1: True, 2: True}


@pytest.mark.parametrize("way", ["abort", "leave"])
def test_what_is_aborted_or_left_makes_room(way: str) -> None:
    rig = Rig(limits=limits(waiting_requests=2, waiting_tokens=6))
    one, two = rig.peer(), rig.peer()
    hold(rig, two)
    one.send(one.add(0), one.add(1))
    rig.turn()
    two.send(two.add(0))
    rig.turn()
    assert set(refused(two)) == {0}
    if way == "abort":
        one.send(one.abort(0, 1))
    else:
        rig.clock.advance(31.0)
        two.send(two.call(9, "is_scheduler_paused"))
    rig.turn(2)
    two.send(two.add(0), two.add(1))
    rig.turn()
    assert not refused(two)


def test_tensors_that_wait_are_counted_however_they_are_nested() -> None:
    rig = Rig(limits=limits(waiting_tensor_bytes=1000))
    peer = rig.peer()
    hold(rig, peer)
    image = {"a": np.zeros(50), "b": [np.zeros(10), {"c": np.zeros((5, 5))}]}
    peer.send(*(msgspec.structs.replace(peer.add(slot), tensors=image) for slot in range(3)), peer.add(9))
    rig.turn()
    errors = refused(peer)
    assert set(errors) == {1, 2}
    assert "680 bytes of tensors" in errors[1].message


def test_a_prompt_longer_than_the_limit_is_taken_when_nothing_waits() -> None:
    rig = Rig(limits=limits(waiting_tokens=5, client_waiting_tokens=5))
    peer = rig.peer()
    hold(rig, peer)
    peer.send(peer.add(0, [1] * 50), peer.add(1))
    rig.turn()
    assert set(refused(peer)) == {1}


def test_a_request_that_was_admitted_elsewhere_is_never_refused() -> None:
    rig = Rig(limits=limits(waiting_requests=1, waiting_tokens=1))
    peer = rig.peer()
    hold(rig, peer)
    again = [msgspec.structs.replace(peer.add(slot), was_admitted=True) for slot in range(1, 9)]
    peer.send(peer.add(0), *again)
    rig.turn()
    assert not refused(peer)


def test_the_hint_is_what_waits_over_the_measured_rate() -> None:
    room = WaitingRoom(limits(waiting_tokens=1000))
    session = Session(SessionId(b"s"), Attach(1, "p", "i", "c", 30.0), Limits(), 0.0)
    for handle in range(20):
        room.enter(handle, session, 100, 0.0)
    for handle in range(10):  # a prompt of 100 tokens in each half second
        room.on_output(np.array([handle], np.uint32), EMPTY, 0.5 * (handle + 1))
    assert (session.waiting, session.waiting_tokens, room.requests, room.tokens) == (10, 1000, 10, 1000)
    refusal = room.refusal(session, 1)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(1000 / 200)


def test_a_rate_without_a_measurement_gives_the_default_and_extremes_are_bounded() -> None:
    rate = Rate()
    assert rate.seconds_for(10**9) == 1.0
    rate.begin(0.0)
    rate.note(1, 10.0)
    assert rate.seconds_for(10**9) == 60.0
    rate.note(10**12, 11.0)
    assert rate.seconds_for(1) == 0.05


def test_the_clients_own_bound_counts_requests_and_their_prompts() -> None:
    def record(tokens: int) -> RequestRecord:
        return RequestRecord(RequestId("r"), b"", tokens, SamplingParams())

    now = iter(range(1000))
    bound = InFlight(3, 100)

    def clock() -> float:
        return float(next(now))

    big = record(150)
    bound.check(big, 1, clock)
    bound.begin(big, clock)
    with pytest.raises(OverloadedError, match="150 prompt tokens") as caught:
        bound.check(record(1), 1, clock)
    assert caught.value.retry_after_s == 1.0
    bound.end(big)
    for _ in range(3):
        bound.check(record(1), 1, clock)
        bound.begin(record(1), clock)
    with pytest.raises(OverloadedError, match="3 requests in flight"):
        bound.check(record(1), 1, clock)
    assert issubclass(OverloadedError, AdmissionError)


@pytest.mark.parametrize("setting", ["client_requests", "client_tokens"])
async def test_a_client_refuses_before_it_sends(setting: str) -> None:
    rig = Rig()
    async with memory_client(rig, limits=Limits(**{setting: 4})) as client:
        streams = [client.generate([1], LONG) for _ in range(4)]
        with pytest.raises(OverloadedError) as caught:
            client.generate([1], request_id="one too many")
        assert (caught.value.request_id, caught.value.retry_after_s > 0) == ("one too many", True)
        with pytest.raises(OverloadedError):
            await client.add_request([1])
        for stream in streams:
            await stream.aclose()
        await until(lambda: client.in_flight() == 0, "all are aborted")
        assert (await client.generate([1], SamplingParams(max_tokens=2)).collect()).token_ids == [1, 1]


async def test_an_engine_without_room_is_passed_over_for_one_that_has_some() -> None:
    rigs = [Rig(rank=rank, limits=limits(waiting_requests=most)) for rank, most in enumerate((1, 20))]
    async with memory_client(*rigs) as client:
        await client.operations.pause_scheduler(mode="keep")
        streams = [client.generate([n], SamplingParams(max_tokens=3)) for n in range(20)]
        reading = [asyncio.create_task(stream.collect()) for stream in streams]
        await client.operations.is_scheduler_paused()
        with pytest.raises(OverloadedError):
            await client.generate([1], data_parallel_rank=0).collect()
        await client.operations.resume_scheduler()
        assert [(await answer).token_ids for answer in reading] == [[n] * 3 for n in range(20)]
        assert {stream.rank for stream in streams} == {0, 1}


async def test_when_no_engine_has_room_the_error_says_when_to_come_again() -> None:
    rigs = [Rig(rank=rank, limits=limits(waiting_requests=2)) for rank in range(3)]
    async with memory_client(*rigs) as client:
        await client.operations.pause_scheduler(mode="keep")
        streams = [client.generate([n], SamplingParams(max_tokens=3)) for n in range(30)]
        reading = [asyncio.create_task(stream.collect()) for stream in streams]
        await client.operations.is_scheduler_paused()
        with pytest.raises(OverloadedError, match="every engine") as caught:
            client.generate([1])
        assert 0 < caught.value.retry_after_s <= 1.0
        await client.operations.resume_scheduler()
        answers = await asyncio.gather(*reading, return_exceptions=True)
        served = [n for n, answer in enumerate(answers) if not isinstance(answer, BaseException)]
        assert len(served) == 6
        refusals = [answer for answer in answers if isinstance(answer, BaseException)]
        assert all(isinstance(error, OverloadedError) and error.retry_after_s > 0 for error in refusals)


@pytest.mark.parametrize("value", [0, -1, "many"])
def test_a_limit_that_can_never_be_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="waiting_requests"):
        parse_config({"engine": "echo", "limits": {"waiting_requests": value}})
    assert parse_config({"engine": "echo", "limits": {"waiting_requests": None}}).limits.waiting_requests is None
    with pytest.raises(ConfigurationError, match="lease_s"):
        parse_config({"engine": "echo", "limits": Limits(lease_s=None)})  # type: ignore[arg-type]
