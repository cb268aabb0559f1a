"""The pause machine: each arrow, and every short sequence of events."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from raycore.core.pause import Pause, PauseConflictError, PauseState, PauseStep, on_idle, on_pause, on_resume, on_withdrawn

RUNNING, PAUSING, PAUSED = PauseState.RUNNING, PauseState.PAUSING, PauseState.PAUSED


@pytest.mark.parametrize("mode", ["abort", "keep"])
@pytest.mark.parametrize("has_work", [True, False])
@pytest.mark.parametrize("state", [Pause(), Pause(PAUSED), Pause(PAUSING, ("w",))])
def test_a_pause_that_does_not_wait_is_complete_at_once(state: Pause, mode: Any, has_work: bool) -> None:
    step = on_pause(state, mode, "call", has_work=has_work)
    assert step.pause == Pause(PAUSED)
    assert step.completed == (*state.waiting, "call")
    assert step.abort_running == (mode == "abort")
    assert not step.release_held


def test_a_waiting_pause_of_a_busy_engine_completes_when_it_is_idle() -> None:
    step = on_pause(Pause(), "wait", "call", has_work=True)
    assert step == PauseStep(Pause(PAUSING, ("call",)))
    assert on_idle(step.pause) == PauseStep(Pause(PAUSED), completed=("call",))


@pytest.mark.parametrize("state", [Pause(), Pause(PAUSED)])
def test_a_waiting_pause_of_an_idle_engine_completes_at_once(state: Pause) -> None:
    assert on_pause(state, "wait", "call", has_work=False) == PauseStep(Pause(PAUSED), completed=("call",))


def test_a_waiting_pause_of_a_paused_engine_completes_although_requests_are_frozen_in_it() -> None:
    assert on_pause(Pause(PAUSED), "wait", "call", has_work=True) == PauseStep(Pause(PAUSED), completed=("call",))


@pytest.mark.parametrize("state", [Pause(), Pause(PAUSED)])
def test_an_idle_engine_means_nothing_unless_a_pause_waits(state: Pause) -> None:
    assert on_idle(state) == PauseStep(state)


def test_a_pause_is_undone_when_the_last_caller_withdraws_and_not_before() -> None:
    both = Pause(PAUSING, ("a", "b"))
    one = on_withdrawn(both, "a")
    assert one == PauseStep(Pause(PAUSING, ("b",)))
    assert on_withdrawn(one.pause, "stranger") == PauseStep(one.pause)
    assert on_withdrawn(one.pause, "b") == PauseStep(Pause(), release_held=True)


@pytest.mark.parametrize("state", [Pause(), Pause(PAUSED)])
def test_withdrawing_after_completion_changes_nothing(state: Pause) -> None:
    assert on_withdrawn(state, "call") == PauseStep(state)


def test_resume_ends_a_pause_and_is_harmless_without_one() -> None:
    assert on_resume(Pause(PAUSED)) == PauseStep(Pause(), release_held=True)
    assert on_resume(Pause()) == PauseStep(Pause())


def test_resume_before_the_pause_is_complete_is_an_error() -> None:
    with pytest.raises(PauseConflictError):
        on_resume(Pause(PAUSING, ("call",)))


EVENTS = ("abort", "keep", "wait", "idle", "withdraw first", "withdraw last", "resume", "work")


def test_no_call_is_lost_or_completed_twice_in_any_sequence_of_five_events() -> None:
    for events in itertools.product(EVENTS, repeat=5):
        _play(events)


def _play(events: tuple[str, ...]) -> None:
    pause, has_work, calls = Pause(), False, itertools.count()
    waiting: list[int] = []
    completed: list[int] = []
    for event in events:
        before = pause
        match event:
            case "work":
                has_work = True
                continue
            case "abort" | "keep" | "wait":
                call = next(calls)
                waiting.append(call)
                step = on_pause(pause, event, call, has_work=has_work)
                has_work = has_work and not step.abort_running
            case "idle":
                has_work = False
                step = on_idle(pause)
            case "withdraw first" | "withdraw last":
                if not waiting:
                    continue
                call = waiting.pop(0 if event == "withdraw first" else -1)
                step = on_withdrawn(pause, call)
            case _:
                if pause.state is PAUSING:
                    continue
                step = on_resume(pause)
        pause = step.pause
        for call in step.completed:
            assert call in waiting, (events, "completed a call that does not wait")
            waiting.remove(call)  # type: ignore[arg-type]
            completed.append(call)  # type: ignore[arg-type]
        assert tuple(waiting) == pause.waiting, events
        assert (pause.state is PAUSING) == bool(pause.waiting), events
        assert step.release_held == (pause.state is RUNNING and before.state is not RUNNING), events
    assert len(completed) == len(set(completed)), events
    end = on_idle(pause)
    assert set(end.completed) == set(waiting), events
