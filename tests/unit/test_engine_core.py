"""The engine core on the in-memory channel, with a scripted engine and a fake clock; its tables are checked after every turn."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from raycore.codec import FrameEncoder
from raycore.config import Limits
from raycore.engine import Detail, FinishReason, RequestRefused
from raycore.engines.echo import EchoEngine, EchoOptions
from raycore.ids import Epoch, Term
from raycore.membership import Membership
from raycore.messages import (
    PROTOCOL_VERSION,
    Attached,
    AttachRefused,
    BadFrame,
    CallResult,
    CancelCall,
    Detach,
    EngineFailed,
    MembershipChanged,
    NotMember,
    Refused,
    Renew,
    SessionExpired,
    StepColumns,
)
from raycore.sampling import SamplingParams
from raycore.tensors import SHARED_MEMORY_DIRECTORY, SharedMemoryFiles
from tests.support.scripted import POOL, Peer, Rig, ScriptedEngine

ABORT, LENGTH = FinishReason.ABORT, FinishReason.LENGTH


@pytest.fixture
def rig() -> Rig:
    return Rig()


# -- requests


def test_a_request_gets_its_tokens_in_order_and_one_end(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, (5, 6, 7), max_tokens=5))
    rig.finish()
    peer.frames()
    assert (peer.tokens, peer.ended) == ({0: [5, 6, 7, 5, 6]}, {0: LENGTH})


def test_two_clients_with_equal_slots_get_only_their_own(rig: Rig) -> None:
    one, two = rig.peer(), rig.peer()
    one.send(one.add(3, (1, 2), max_tokens=4))
    two.send(two.add(3, (8, 9), max_tokens=3))
    rig.finish()
    for peer in (one, two):
        peer.frames()
    assert (one.tokens, two.tokens) == ({3: [1, 2, 1, 2]}, {3: [8, 9, 8]})


def test_an_abort_never_overtakes_its_add_and_a_stop_never_its_request(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, name="a"), peer.abort(0), peer.add(0, (4,), name="b", max_tokens=2))
    rig.finish()
    peer.frames()
    assert peer.ends == [(0, ABORT), (0, LENGTH)]
    assert [entry for entry in rig.engine.log if entry[0] != "step"] == [("add", "a"), ("abort", "a"), ("add", "b")]


def test_an_abort_of_a_slot_that_is_not_in_use_is_ignored(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.abort(0, 7, 2**32 - 1), peer.add(0, max_tokens=1), peer.abort(5, 5))
    rig.finish()
    peer.frames()
    assert peer.ended == {0: LENGTH}


def test_an_abort_named_twice_ends_once(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=99))
    rig.turn()
    peer.send(peer.abort(0, 0), peer.abort(0))
    rig.turn()
    peer.frames()
    assert peer.ended == {0: ABORT}
    assert not rig.engine.requests


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestRefused("too odd"), "InvalidRequestError"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_add_that_raises_fails_alone(rig: Rig, error: Exception, kind: str) -> None:
    rig.engine.add_errors["bad"] = error
    peer = rig.peer()
    peer.send(peer.add(0, name="good", max_tokens=2), peer.add(1, name="bad"), peer.add(2, name="too", max_tokens=1))
    rig.finish()
    items = peer.items()
    (refused,) = [item for item in items if isinstance(item, Refused)]
    assert (refused.slot, refused.error.type) == (1, kind)
    assert peer.ended == {0: LENGTH, 2: LENGTH}


def test_an_error_whose_text_cannot_be_encoded_is_answered_all_the_same(rig: Rig) -> None:
    rig.engine.add_errors["bad"] = ValueError("no file \udc80")
    rig.engine.rpc["fail"] = _raiser(OSError("path \udcff"))
    peer = rig.peer()
    peer.send(peer.add(0, name="bad"), peer.call(1, "collective_rpc", method="fail"))
    rig.turn()
    items = peer.items()
    assert {type(item) for item in items} >= {Refused, CallResult}


def test_a_detail_whose_text_cannot_be_encoded_does_not_end_the_core(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0))
    rig.engine.before_step = lambda: rig.engine.end_all(FinishReason.ERROR, Detail(error_type="OSError", error_message="\udc80"))
    rig.turn()
    peer.frames()
    assert peer.ended == {0: FinishReason.ERROR}


def test_a_step_that_raises_is_reported_to_every_session_with_its_type_and_traceback(rig: Rig) -> None:
    one, two = rig.peer(), rig.peer()
    one.send(one.add(0))
    rig.engine.before_step = _raiser(ZeroDivisionError("the step is at fault"))
    with pytest.raises(ZeroDivisionError):
        rig.core.run()
    for peer in (one, two):
        (failed,) = peer.items(EngineFailed)
        assert (failed.error.type, failed.error.message) == ("ZeroDivisionError", "the step is at fault")
        assert "before_step" in failed.error.traceback


def test_a_slot_in_use_is_not_given_to_a_second_request(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, (1,), name="first", max_tokens=3), peer.add(0, (2,), name="second", max_tokens=3))
    rig.finish()
    peer.frames()
    assert peer.tokens == {0: [1, 1, 1]}
    assert ("add", "second") not in rig.engine.log
    assert rig.core.counters.stale_frames == 1


def test_a_slot_beyond_the_limit_is_refused_and_not_lost() -> None:
    rig = Rig(limits=Limits(session_requests=4))
    peer = rig.peer()
    peer.send(peer.add(4), peer.add(2**31), peer.add(3, max_tokens=1))
    rig.finish()
    refused = peer.items(Refused)
    assert sorted(item.slot for item in refused) == [4, 2**31]
    assert peer.ended == {3: LENGTH}


def test_a_token_column_that_is_no_uint32_is_refused(rig: Rig) -> None:
    peer = rig.peer()
    good = peer.add(0)
    peer.send(msgspec.structs.replace(good, prompt=b"\1\2\3"), msgspec.structs.replace(good, slot=1, delivered=b"\1"))
    rig.turn()
    assert [item.slot for item in peer.items(Refused)] == [0, 1]


@pytest.mark.parametrize(
    "values",
    [{"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 2**62}, {"min_tokens": 9, "max_tokens": 8}, {"min_tokens": -1},
     {"temperature": -1.0},
     {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": math.nan}, {"seed": -1},
     {"stop": ("",)},
     {"stop_token_ids": (-1,)}, {"stop_token_ids": (2**63,)}],
    ids=str,
)  # fmt: skip
def test_sampling_that_a_client_should_have_refused_is_refused_here_too(values: dict[str, Any]) -> None:
    rig = Rig(EchoEngine(EchoOptions()))
    peer = rig.peer()
    peer.send(peer.add(0, **values), peer.add(1, max_tokens=2))
    rig.finish(limit=10)
    (refused,) = peer.items(Refused)
    assert (refused.slot, refused.error.type) == (0, "InvalidRequestError")
    assert peer.ended == {1: LENGTH}


def test_prompts_that_a_client_should_have_refused_are_refused_here_too() -> None:
    rig = Rig(EchoEngine(EchoOptions(max_model_len=64)))
    peer = rig.peer()
    peer.send(peer.add(0, ()), peer.add(1, (999_999,)), peer.add(2, (1,) * 64), peer.add(3, (1,) * 63, max_tokens=5))
    rig.finish()
    assert [item.slot for item in peer.items(Refused)] == [0, 1, 2]
    assert len(peer.tokens[3]) == 1


def test_a_replay_goes_on_after_what_was_delivered_and_says_where(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, (1, 2, 3), delivered=(1, 2), max_tokens=5), peer.add(1, (7,), max_tokens=1))
    rig.finish()
    peer.frames()
    assert peer.tokens == {0: [-1, -1, 3, 1, 2], 1: [7]}


# -- membership


def test_a_non_member_sends_work_back_with_the_membership(rig: Rig) -> None:
    peer = rig.peer()
    running = peer.add(0, max_tokens=5)
    peer.send(running)
    rig.turn()
    rig.core.set_membership(Membership(POOL, Epoch(2), Term(1), ()))
    rig.turn()
    peer.send(peer.add(1))
    rig.finish()
    items = peer.items()
    (back,) = [item for item in items if isinstance(item, NotMember)]
    assert np.frombuffer(back.slots, np.uint32).tolist() == [1]
    assert back.membership.epoch == 2
    assert [item.membership.epoch for item in items if isinstance(item, MembershipChanged)] == [2]
    assert peer.ended == {0: LENGTH}, "what runs goes on"


def test_an_older_membership_changes_nothing(rig: Rig) -> None:
    peer = rig.peer()
    peer.frames()
    for stale in (Membership(POOL, Epoch(1), Term(1), ()), Membership(POOL, Epoch(9), Term(0), ())):
        rig.core.set_membership(stale)
        rig.turn()
    assert not peer.items()
    peer.send(peer.add(0, max_tokens=1))
    rig.finish()
    assert not peer.items(NotMember)


def until_stopped(rig: Rig, peer: Peer, turns: int = 20) -> list[Any]:
    """Everything that the peer is told until the core says farewell."""
    items: list[Any] = []
    for _ in range(turns):
        rig.turn()
        rig.clock.advance(0.2)
        items += peer.items()
        if any(isinstance(item, EngineFailed) for item in items):
            return items
    raise AssertionError(f"not stopped after {turns} turns")


def test_a_stopping_core_drains_what_runs_and_takes_nothing_new(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=3))
    rig.turn()
    rig.core.stop(60.0)
    peer.send(peer.add(1))
    items = until_stopped(rig, peer)
    assert peer.ended == {0: LENGTH}
    assert [type(item) for item in items if not isinstance(item, StepColumns)][-2:] == [NotMember, EngineFailed]
    assert items[-1].error.type == "EngineStopped"


def test_a_stopping_core_aborts_what_does_not_finish_in_time(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=1000))
    rig.turn()
    rig.core.stop(5.0)
    rig.turn(3)
    assert not peer.items(EngineFailed)
    rig.clock.advance(5.1)
    until_stopped(rig, peer)
    assert peer.ended == {0: ABORT}


def test_a_stopping_core_does_not_wait_for_requests_that_are_held(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.call(1, "pause_scheduler", mode="keep"), peer.add(0))
    rig.turn()
    rig.core.stop(60.0)
    until_stopped(rig, peer, turns=5)
    assert peer.ended == {0: ABORT}


# -- sessions


@pytest.mark.parametrize(
    "changes",
    [{"pool": "other"}, {"incarnation": "i-before"}, {"version": PROTOCOL_VERSION + 1}, {"lease_s": 0.0}, {"lease_s": -1.0},
     {"lease_s": math.nan},
     {"lease_s": math.inf}, {"lease_s": 1e9}],
    ids=str,
)  # fmt: skip
def test_who_does_not_fit_is_refused_with_the_reason(rig: Rig, changes: dict[str, Any]) -> None:
    peer = rig.peer(**changes)
    (refused,) = peer.items()
    assert isinstance(refused, AttachRefused)
    assert refused.reason
    peer.send(peer.add(0))
    rig.turn()
    assert not rig.engine.requests
    assert [type(item) for item in peer.items()] == [SessionExpired]


def test_an_attach_is_answered_with_who_this_is(rig: Rig) -> None:
    peer = Peer(rig)
    peer.attach(peer.add(0, max_tokens=1))
    rig.finish()
    frames = peer.frames()
    attached = frames[0].items[0]
    assert isinstance(attached, Attached)
    assert (attached.engine, attached.info, attached.can_share_memory) == (rig.id, rig.engine.info, False)
    assert peer.ended == {0: LENGTH}, "what follows an attach in its frame is served"
    assert [frame.seq for frame in frames] == list(range(len(frames)))


def test_a_session_that_nobody_opened_is_told_that_it_expired(rig: Rig) -> None:
    peer = Peer(rig)
    peer.send(peer.add(0), seq=0)
    peer.send(Renew(), seq=17)
    rig.turn()
    frames = peer.frames()
    assert [type(item) for frame in frames for item in frame.items] == [SessionExpired] * 2
    assert {frame.seq for frame in frames} == {-1}
    assert rig.core.counters.stale_frames == 2


@pytest.mark.parametrize("seq", [0, 1, 3, 100, -1, 2**63])
def test_a_gap_or_a_repeat_in_the_numbers_ends_the_session_and_aborts_its_requests(rig: Rig, seq: int) -> None:
    peer, other = rig.peer(), rig.peer()
    peer.send(peer.add(0, max_tokens=50))
    other.send(other.add(0, max_tokens=3))
    rig.turn()
    peer.send(Renew(), seq=seq if seq != 2 else 5)
    rig.finish()
    assert [type(item) for item in peer.items() if not isinstance(item, (StepColumns, Attached))] == [SessionExpired]
    other.frames()
    assert other.ended == {0: LENGTH}
    assert ("abort", f"{peer.id[-1]}-0") in rig.engine.log


def test_an_attach_ends_the_session_that_it_replaces(rig: Rig) -> None:
    old = rig.peer()
    old.send(old.add(0, name="old", max_tokens=500))
    rig.turn()
    rig.peer(replaces=old.id)
    assert not rig.engine.requests
    old.send(Renew())
    rig.turn()
    assert old.items(SessionExpired)


def test_a_session_may_not_attach_twice(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=3))
    peer.attach()
    rig.finish()
    peer.frames()
    assert peer.ended == {0: LENGTH}


def test_what_follows_a_farewell_in_its_frame_is_not_run(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, name="before", max_tokens=500), Detach(), peer.add(1, name="after"), peer.call(1, "execute_dummy_batch"))
    rig.turn(3)
    assert not rig.engine.requests
    assert ("add", "after") not in rig.engine.log
    assert ("idle", 0) not in rig.engine.log


def test_a_silent_session_is_ended_with_its_lease_and_a_renewed_one_is_not(rig: Rig) -> None:
    silent, alive = rig.peer(lease_s=10.0), rig.peer(lease_s=10.0)
    silent.send(silent.add(0, name="silent", max_tokens=10_000))
    alive.send(alive.add(0, name="alive", max_tokens=10_000))
    rig.turn()
    for _ in range(4):
        rig.clock.advance(3.0)
        alive.send(Renew())
        rig.turn()
    assert [request.request_id for request in rig.engine.requests.values()] == ["alive"]
    silent.send(Renew())
    rig.turn()
    assert silent.items(SessionExpired)


def test_a_silent_session_keeps_its_lease_to_the_end(rig: Rig) -> None:
    peer = rig.peer(lease_s=10.0)
    peer.send(peer.add(0, max_tokens=10_000))
    rig.turn()
    rig.clock.advance(9.9)
    rig.turn(2)
    assert rig.engine.requests


def test_a_disconnected_client_has_its_grace_however_long_it_was_silent(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=10_000))
    rig.turn()
    rig.clock.advance(9.0)
    rig.listener.disconnect(peer.id)
    rig.turn(2)
    rig.clock.advance(0.4)
    rig.turn(2)
    assert rig.engine.requests, "the grace is half a second from the disconnect"
    rig.clock.advance(0.3)
    rig.turn(2)
    assert not rig.engine.requests


def test_a_client_that_comes_back_within_the_grace_misses_nothing(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, (1, 2), max_tokens=6))
    rig.turn(2)
    rig.listener.disconnect(peer.id)
    rig.turn(2)
    rig.listener.connect(peer.id, peer)  # type: ignore[arg-type]
    rig.clock.advance(0.5)
    rig.finish()
    rig.turn()
    peer.frames()
    assert (peer.tokens, peer.ended) == ({0: [1, 2, 1, 2, 1, 2]}, {0: LENGTH})


def test_a_slow_client_loses_its_session_and_nobody_else_notices() -> None:
    rig = Rig(limits=Limits(session_backlog_bytes=2000), capacity=3)
    slow, fast = rig.peer(), rig.peer()
    slow.send(slow.add(0, name="slow", max_tokens=10_000))
    fast.send(fast.add(0, (1, 2, 3), name="fast", max_tokens=300))
    for _ in range(300):
        rig.turn()
        fast.frames()
    assert fast.tokens[0] == [1, 2, 3] * 100
    assert rig.core.counters.ended_sessions == 1
    assert not rig.engine.requests
    slow.frames()
    rig.clock.advance(0.2)
    rig.turn()
    assert slow.items(SessionExpired), "it is told as soon as it takes anything"


def test_a_backlog_leaves_in_order_once_the_client_takes_frames_again() -> None:
    rig = Rig(capacity=2)
    peer = rig.peer()
    peer.send(peer.add(0, (1, 2, 3), max_tokens=60))
    rig.turn(30)
    taken = 0
    for _ in range(200):
        taken += len(peer.frames())
        rig.turn()
    assert peer.tokens[0] == [1, 2, 3] * 20
    assert peer.ended == {0: LENGTH}


def test_a_freed_slot_keeps_its_frames_apart_through_a_backlog() -> None:
    rig = Rig(capacity=1)
    peer = rig.peer()
    for round_ in range(5):
        peer.ended.clear()
        peer.tokens.clear()
        peer.send(peer.add(0, (round_,), max_tokens=3))
        for _ in range(20):
            rig.turn()
            peer.frames()
        assert (peer.tokens, peer.ended) == ({0: [round_] * 3}, {0: LENGTH})


# -- frames that are not right


def test_random_bytes_are_counted_and_end_nothing_but_their_session(rig: Rig) -> None:
    good, bad, stranger = rig.peer(), rig.peer(), Peer(rig)
    good.send(good.add(0, max_tokens=3))
    bad.send_raw(b"\xc1random")
    stranger.send_raw(b"")
    rig.finish()
    assert rig.core.counters.bad_frames == 2
    assert [type(item) for item in stranger.items()] == [BadFrame]
    assert bad.items(SessionExpired)
    good.frames()
    assert good.ended == {0: LENGTH}


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_bad_request_in_a_good_frame_is_refused_alone(rig: Rig, where: int) -> None:
    peer = rig.peer()
    adds: list[Any] = [peer.add(slot, max_tokens=2) for slot in range(3)]
    fields = list(msgspec.structs.astuple(adds[where]))
    adds[where] = [1, *fields[:2], "not bytes", *fields[3:]]
    peer.send_raw(bytes(FrameEncoder().encode([peer.seq, adds])[0]))
    rig.finish()
    (refused,) = peer.items(Refused)
    assert (refused.slot, refused.error.type) == (where, "InvalidRequestError")
    assert peer.ended == {slot: LENGTH for slot in range(3) if slot != where}
    assert rig.core.counters.bad_frames == 1


def test_a_bad_call_in_a_good_frame_is_answered_alone(rig: Rig) -> None:
    peer = rig.peer()
    peer.send_raw(bytes(FrameEncoder().encode([peer.seq, [[3, 77, 5, {}], [1, *msgspec.structs.astuple(peer.add(0, max_tokens=1))]]])[0]))
    rig.finish()
    items = peer.items()
    (result,) = [item for item in items if isinstance(item, CallResult)]
    assert (result.call_id, result.error.type) == (77, "InvalidRequestError")
    assert peer.ended == {0: LENGTH}


def test_a_good_request_with_a_shared_tensor_survives_a_bad_one_in_its_frame(rig: Rig) -> None:
    files = SharedMemoryFiles(POOL)
    encoder = FrameEncoder(inline_bytes=1, shared_memory_bytes=10)
    encoder.share_memory(files)
    peer = rig.peer()
    good = msgspec.structs.astuple(peer.add(0, name="good"))
    frame = [peer.seq, [[1, *good[:6], {"image": np.arange(100)}], [1, 1, "bad", 5, None]]]
    rig.listener.push(peer.id, encoder.encode(frame))
    rig.turn()
    assert [item.slot for item in peer.items(Refused)] == [1]
    (request,) = rig.engine.requests.values()
    assert np.array_equal(request.tensors["image"], np.arange(100))
    assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{POOL}-*"))


def test_a_request_whose_tensor_is_not_there_is_refused_alone(rig: Rig) -> None:
    files = SharedMemoryFiles(POOL)
    encoder = FrameEncoder(inline_bytes=1, shared_memory_bytes=10)
    encoder.share_memory(files)
    peer = rig.peer()
    good = msgspec.structs.astuple(peer.add(0, name="good"))
    message = encoder.encode([peer.seq, [[1, *good[:6], {"image": np.arange(100)}], [1, 1, *good[1:6]]]])
    for name in files.take_names():
        files.discard(name)
    rig.listener.push(peer.id, message)
    rig.turn()
    assert [item.slot for item in peer.items(Refused)] == [0]
    assert len(rig.engine.requests) == 1


# -- calls


def test_only_declared_operations_and_rpc_methods_can_be_called(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(
        peer.call(1, "close"),
        peer.call(2, "collective_rpc", method="__init__"),
        peer.call(3, "sleep"),
        peer.call(4, "collective_rpc", method="echo", args=[1], kwargs={"a": 2}),
    )
    rig.turn()
    results = peer.results()
    assert [results[number].error and results[number].error.type for number in (1, 2, 3, 4)] == [
        "UnknownOperationError",
        "NotSupportedError",
        "NotSupportedError",
        None,
    ]
    assert "sleep" in results[3].error.message
    assert peer.value(results[4]) == {"args": [1], "kwargs": {"a": 2}}
    assert not rig.engine.is_closed


def test_wrong_arguments_are_answered_as_such(rig: Rig) -> None:
    peer = rig.peer()
    rig.engine.rpc["two"] = lambda a, b: (a, b)
    peer.send(
        peer.call(1, "collective_rpc", method="two", args=[1]),
        msgspec.structs.replace(peer.call(2, "pause_scheduler"), arguments=FrameEncoder().encode_part({"mode": "later"})),
        msgspec.structs.replace(peer.call(3, "resume_scheduler"), arguments=FrameEncoder().encode_part([1])),
    )
    rig.turn()
    assert {result.error.type for result in peer.results().values()} == {"InvalidArgumentsError"}


def test_what_a_method_raises_is_answered_with_type_text_and_traceback(rig: Rig) -> None:
    rig.engine.rpc["fail"] = _raiser(KeyError("missing"))
    peer = rig.peer()
    peer.send(peer.call(1, "collective_rpc", method="fail"))
    rig.turn()
    error = peer.results()[1].error
    assert (error.type, error.message) == ("KeyError", "'missing'")
    assert "raise error" in error.traceback


@pytest.mark.parametrize("result", [object(), 2**80, "\ud800", np.array([object()]), lambda: 1], ids=lambda value: type(value).__name__)
def test_a_result_that_cannot_be_sent_is_an_error_and_no_end(rig: Rig, result: Any) -> None:
    rig.engine.rpc["give"] = lambda: [np.arange(1000), result]
    peer = rig.peer()
    peer.send(peer.call(1, "collective_rpc", method="give"), peer.call(2, "collective_rpc", method="echo", args=[5]))
    rig.turn()
    results = peer.results()
    assert results[1].error is not None
    assert peer.value(results[2])["args"] == [5]


def test_calls_of_one_frame_are_answered_in_order(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(*(peer.call(number, "is_scheduler_paused") for number in range(50)))
    rig.turn()
    assert list(peer.results()) == list(range(50))


# -- pause


def paused(rig: Rig, peer: Peer) -> bool:
    peer.send(peer.call(900, "is_scheduler_paused"))
    rig.turn()
    return peer.value(peer.results()[900])


def test_a_kept_pause_freezes_requests_and_resume_goes_on_exactly(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, (1, 2, 3), max_tokens=6))
    rig.turn(2)
    peer.send(peer.call(1, "pause_scheduler", mode="keep"))
    rig.turn(5)
    assert peer.results()[1].error is None
    before = len(peer.tokens[0])
    rig.turn(5)
    peer.frames()
    assert len(peer.tokens[0]) == before
    assert paused(rig, peer)
    peer.send(peer.call(2, "resume_scheduler"))
    rig.finish()
    peer.frames()
    assert (peer.tokens[0], peer.ended) == ([1, 2, 3, 1, 2, 3], {0: LENGTH})


def test_an_aborting_pause_ends_what_runs_and_holds_what_comes(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=100))
    rig.turn()
    peer.send(peer.call(1, "pause_scheduler", mode="abort"), peer.add(1, name="held", max_tokens=1))
    rig.turn(3)
    assert peer.results()[1].error is None
    assert peer.ended == {0: ABORT}
    assert ("add", "held") not in rig.engine.log
    peer.send(peer.call(2, "resume_scheduler"))
    rig.turn(3)
    peer.frames()
    assert peer.ended == {0: ABORT, 1: LENGTH}


def test_a_waiting_pause_completes_when_what_runs_has_finished_and_holds_the_rest(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=4))
    rig.turn()
    peer.send(peer.call(1, "pause_scheduler", mode="wait"), peer.add(1, name="held", max_tokens=1))
    rig.turn()
    assert 1 not in peer.results()
    rig.turn(6)
    assert peer.results()[1].error is None
    assert peer.ended == {0: LENGTH}
    assert ("add", "held") not in rig.engine.log
    assert paused(rig, peer)


def test_a_waiting_pause_that_its_caller_cancels_is_undone(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=1000))
    rig.turn()
    peer.send(peer.call(1, "pause_scheduler", mode="wait"), peer.add(1, name="held", max_tokens=1))
    rig.turn()
    peer.send(CancelCall(1))  # type: ignore[arg-type]
    rig.turn(3)
    assert 1 not in peer.results()
    assert peer.ended == {1: LENGTH}
    assert not paused(rig, peer)


def test_a_waiting_pause_is_undone_when_its_callers_session_ends(rig: Rig) -> None:
    caller, other = rig.peer(), rig.peer()
    other.send(other.add(0, max_tokens=1000))
    rig.turn()
    caller.send(caller.call(1, "pause_scheduler", mode="wait"))
    other.send(other.add(1, name="held", max_tokens=1))
    rig.turn()
    caller.send(Detach())
    rig.turn(3)
    other.frames()
    assert other.ended == {1: LENGTH}
    assert not paused(rig, other)


def test_a_held_request_can_be_aborted_and_never_reaches_the_engine(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.call(1, "pause_scheduler", mode="keep"), peer.add(0, name="held"), peer.add(1, name="kept", max_tokens=1))
    rig.turn()
    peer.send(peer.abort(0))
    rig.turn()
    peer.frames()
    assert peer.ended == {0: ABORT}
    peer.send(peer.call(2, "resume_scheduler"))
    rig.turn(3)
    peer.frames()
    assert peer.ended == {0: ABORT, 1: LENGTH}
    assert ("add", "held") not in rig.engine.log


def test_held_requests_go_with_their_session(rig: Rig) -> None:
    gone, other = rig.peer(), rig.peer()
    other.send(other.call(1, "pause_scheduler", mode="keep"))
    gone.send(gone.add(0, name="gone"))
    rig.turn()
    gone.send(Detach())
    other.send(other.add(0, name="mine", max_tokens=1), other.call(2, "resume_scheduler"))
    rig.turn(3)
    other.frames()
    assert other.ended == {0: LENGTH}
    assert ("add", "gone") not in rig.engine.log


def test_held_requests_are_admitted_in_their_order_and_a_bad_one_fails_alone(rig: Rig) -> None:
    rig.engine.add_errors["b"] = RequestRefused("no")
    peer = rig.peer()
    peer.send(peer.call(1, "pause_scheduler", mode="keep"), *(peer.add(slot, name="abc"[slot], max_tokens=1) for slot in range(3)))
    rig.turn()
    peer.send(peer.call(2, "resume_scheduler"))
    rig.turn(2)
    assert [item.slot for item in peer.items(Refused)] == [1]
    assert [name for kind, name in rig.engine.log if kind == "add"] == ["a", "b", "c"]
    assert peer.ended == {0: LENGTH, 2: LENGTH}


def test_a_resume_before_the_pause_is_complete_is_an_error_and_changes_nothing(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=5))
    rig.turn()
    peer.send(peer.call(1, "pause_scheduler", mode="wait"), peer.call(2, "resume_scheduler"))
    rig.turn()
    assert peer.results()[2].error is not None
    rig.turn(6)
    assert peer.results()[1].error is None


def test_several_waiting_pauses_complete_together_and_once(rig: Rig) -> None:
    one, two = rig.peer(), rig.peer()
    one.send(one.add(0, max_tokens=6))
    rig.turn()
    one.send(one.call(1, "pause_scheduler", mode="wait"))
    two.send(two.call(1, "pause_scheduler", mode="wait"), two.call(2, "pause_scheduler", mode="wait"))
    rig.turn(10)
    assert [item.call_id for item in one.items(CallResult)] == [1]
    assert [item.call_id for item in two.items(CallResult)] == [1, 2]


@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
def test_a_cache_reset_that_fails_is_the_pausing_callers_error_and_ends_nothing(rig: Rig, mode: str) -> None:
    rig.engine.methods["reset_prefix_cache"] = _raiser(RuntimeError("cache in use"))
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=3))
    rig.turn()
    if mode == "keep":
        rig.finish()  # a cache is reset only when nothing runs
    peer.send(peer.call(1, "pause_scheduler", mode=mode), peer.call(2, "pause_scheduler", mode=mode, clear_cache=False))
    rig.turn(6)
    results = peer.results()
    assert results[1].error.type == "RuntimeError"
    assert results[2].error is None
    peer.send(peer.call(3, "resume_scheduler"), peer.add(1, max_tokens=1))
    rig.turn(3)
    assert peer.results()[3].error is None
    assert peer.ended[1] == LENGTH


# -- profile


def profile(peer: Peer, number: int, **arguments: Any) -> None:
    peer.send(peer.call(number, "profile", **arguments))


def test_a_profile_is_written_between_start_and_stop(rig: Rig, tmp_path: Path) -> None:
    peer = rig.peer()
    profile(peer, 1, directory=str(tmp_path), prefix="mine")
    peer.send(peer.add(0, max_tokens=3))
    rig.finish()
    profile(peer, 2, start=False)
    rig.turn()
    results = peer.results()
    path = Path(peer.value(results[2]))
    assert path == Path(peer.value(results[1]))
    assert (path.parent, path.name.startswith("mine"), path.stat().st_size > 0) == (tmp_path, True, True)


def test_a_profile_begins_after_its_delay_and_stops_by_itself(rig: Rig, tmp_path: Path) -> None:
    peer = rig.peer()
    profile(peer, 1, directory=str(tmp_path), delay_steps=2, max_steps=3)
    peer.send(peer.add(0, max_tokens=100))
    rig.turn(3)
    assert not list(tmp_path.iterdir())
    rig.turn(4)
    assert list(tmp_path.iterdir())
    profile(peer, 2, start=False)
    rig.turn()
    error = peer.results()[2].error
    assert error.type == "EngineStateError"
    assert str(next(tmp_path.iterdir())) in error.message


def test_profiles_that_cannot_be_are_refused(rig: Rig, tmp_path: Path) -> None:
    peer = rig.peer()
    profile(peer, 1, start=False)
    profile(peer, 2, directory=str(tmp_path / "none"))
    profile(peer, 3, directory=str(tmp_path), prefix="../x")
    profile(peer, 4, directory=str(tmp_path), delay_steps=-1)
    profile(peer, 5, directory=str(tmp_path), prefix="a\0b", max_steps=1)
    profile(peer, 6, directory=str(tmp_path), prefix="x" * 300, max_steps=1)
    profile(peer, 7, directory=str(tmp_path), max_steps=50)
    profile(peer, 8, directory=str(tmp_path))
    rig.turn()
    errors = {number: result.error and result.error.type for number, result in peer.results().items()}
    assert errors == {
        1: "EngineStateError",
        2: "FileNotFoundError",
        3: "ValueError",
        4: "ValueError",
        5: "ValueError",
        6: "ValueError",
        7: None,
        8: "EngineStateError",
    }
    profile(peer, 9, start=False)
    rig.turn()
    assert peer.results()[9].error is None


def test_a_profile_that_cannot_be_written_ends_nothing(rig: Rig, tmp_path: Path) -> None:
    directory = tmp_path / "soon gone"
    directory.mkdir()
    peer = rig.peer()
    profile(peer, 1, directory=str(directory), max_steps=2)
    peer.send(peer.add(0, max_tokens=6))
    rig.turn()
    directory.rmdir()
    rig.finish()
    profile(peer, 2, start=False)
    profile(peer, 3, directory=str(tmp_path), prefix="next")
    profile(peer, 4, start=False)
    rig.turn()
    results = peer.results()
    assert peer.ended == {0: LENGTH}
    assert "the last one failed" in results[2].error.message
    assert Path(peer.value(results[4])).exists()


def test_a_second_profile_of_a_name_does_not_replace_the_first(rig: Rig, tmp_path: Path) -> None:
    peer = rig.peer()
    for number in (1, 3, 5):
        profile(peer, number, directory=str(tmp_path), prefix="same")
        profile(peer, number + 1, start=False)
    rig.turn()
    results = peer.results()
    paths = [Path(peer.value(results[number])) for number in (2, 4, 6)]
    assert len(set(paths)) == 3
    assert all(path.name.startswith(f"same-rank0-{os.getpid()}") and path.exists() for path in paths)


def test_a_profile_without_a_bound_of_its_own_ends_all_the_same(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycore.core.profiler.MOST_STEPS", 5)
    peer = rig.peer()
    profile(peer, 1, directory=str(tmp_path))
    peer.send(peer.add(0, max_tokens=20))
    rig.turn(4)
    assert not list(tmp_path.iterdir())
    rig.turn(2)
    assert list(tmp_path.iterdir())


def test_an_idle_core_reports_an_empty_load(rig: Rig) -> None:
    peer = rig.peer()
    peer.send(peer.add(0, max_tokens=2))
    rig.finish()
    peer.send(peer.call(1, "dp_engines_running"))
    rig.turn()
    frames = peer.frames()
    assert (frames[-1].load.running, frames[-1].own_requests, frames[-1].ack) == (0, 0, peer.seq - 1)


def _raiser(error: Exception) -> Callable[..., Any]:
    def before_step(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return before_step


def test_the_scripted_engine_is_what_the_tests_think_it_is() -> None:
    engine = ScriptedEngine()
    assert not engine.has_work()
    assert SamplingParams().max_tokens == 16
