"""Scaling operations: every order of answers, deaths, failures, cancels, expiries and takeovers of small ones is walked."""

from __future__ import annotations

import pytest

from elastic import operation as scaling
from elastic.operation import Command, Goal, Operation, Phase, Transition
from raycore.ids import EngineId, Incarnation, Rank

LIMITS = dict.fromkeys(Phase, 10.0)


def engine(rank: int) -> EngineId:
    return EngineId(Rank(rank), Incarnation(f"i{rank}"))


GROW = Goal(stay=(engine(0), engine(1)), joining=(Rank(2), Rank(3)))
SHRINK = Goal(stay=(engine(1),), leaving=(engine(0), engine(2)))
CHANGE = Goal(stay=(engine(0),), joining=(Rank(2),), leaving=(engine(1),))
GOALS = [GROW, SHRINK, CHANGE]


def successors(state: Operation) -> list[tuple[str, Operation, tuple[Command, ...]]]:
    """Everything that may happen next, each answer also as a repetition, a stranger's and an older phase's."""
    found: list[tuple[str, Operation, tuple[Command, ...]]] = []
    for rank in map(Rank, range(5)):
        who = engine(rank) if state.phase is Phase.SPAWN else None
        found.append((f"answer {rank}", *scaling.answered(state, state.phase, rank, 0.0, who)))
        found.append((f"stale answer {rank}", *scaling.answered(state, Phase.RESERVE, rank, 0.0)))
        found.append((f"death {rank}", *scaling.died(state, engine(rank), "killed", 0.0)))
    found.append(("failure", *scaling.failed(state, "no room", 0.0)))
    found.append(("cancel", *scaling.cancelled(state, 0.0)))
    found.append(("return", *scaling.returned(state, "a joiner died", 0.0)))
    found.append(("expiry", *scaling.expired(state, 100.0)))
    found.append(("early expiry", *scaling.expired(state, 0.0)))
    if not state.phase.is_end:
        held = [engine(0)] if state.phase.is_decided else []
        found.append(("takeover", *scaling.taken_over(state, held, 0.0)))
    return found


def identity(state: Operation) -> tuple[object, ...]:
    return (state.phase, state.waiting, state.joined, state.goal, bool(state.error), state.laggards[-2:])


@pytest.mark.parametrize("goal", GOALS, ids=["grow", "shrink", "both"])
def test_every_order_of_events_ends_in_one_of_two_ends_and_never_turns_back_after_the_decision_but_to_where_it_was(goal: Goal) -> None:
    first, _ = scaling.begin("op", goal, LIMITS, 0.0)
    seen = {identity(first)}
    ahead = [first]
    ends: set[Phase] = set()
    while ahead:
        state = ahead.pop()
        leads_on = False
        for event, after, commands in successors(state):
            if event == "return":
                assert (after.phase is Phase.ROLLING_BACK) == (state.phase in {Phase.COMMIT, Phase.ROLLING_BACK})
            elif state.phase.is_decided:
                assert after.phase.is_decided, f"{event} undid a decided operation"
            if state.phase is Phase.ROLLING_BACK:
                assert after.phase in {Phase.ROLLING_BACK, Phase.UNDONE}, f"{event} revived an undone operation"
            if state.phase.is_end:
                assert identity(after) == identity(state), f"{event} changed an ended operation"
                assert not commands
            if after.phase is state.phase and event != "takeover":
                assert not commands, f"{event} repeated a command"
            if after.phase.is_end:
                assert not after.waiting
                assert (after.phase is Phase.UNDONE) == bool(after.error)
                assert event == "early expiry" or state.phase.is_end or commands[-1] is Command.REPORT
            else:
                assert after.waiting, f"{event} left {after.phase} with nothing to wait for"
            phases = [transition.phase for transition in after.transitions]
            assert len(phases) == len(set(phases)) or phases.count(Phase.COMMIT) > 1, "a phase is entered once, but for takeovers"
            leads_on |= after.phase is not state.phase or len(after.waiting) < len(state.waiting)
            ends.add(after.phase)
            if identity(after) not in seen:
                seen.add(identity(after))
                ahead.append(after)
        assert leads_on or state.phase.is_end, f"{state.phase} can never be left"
    assert {Phase.DONE, Phase.UNDONE} <= ends
    assert len(seen) > 50


def walk(goal: Goal) -> tuple[list[Command], Operation]:
    """Everyone answers, in order."""
    state, commands = scaling.begin("op", goal, LIMITS, 0.0)
    done = list(commands)
    while not state.phase.is_end:
        rank = min(state.waiting)
        who = engine(rank) if state.phase is Phase.SPAWN else None
        state, commands = scaling.answered(state, state.phase, rank, 1.0, who)
        done += commands
    return done, state


def test_growing_reserves_before_any_member_hears_of_it() -> None:
    commands, state = walk(GROW)
    assert commands == [Command.RESERVE, Command.SPAWN, Command.PREPARE, Command.COMPARE, Command.DECIDE, Command.RETIRE, Command.REPORT]
    assert state.joined == (engine(2), engine(3))
    assert state.phase is Phase.DONE


def test_shrinking_reserves_and_spawns_nothing() -> None:
    commands, state = walk(SHRINK)
    assert commands == [Command.PREPARE, Command.COMPARE, Command.DECIDE, Command.RETIRE, Command.REPORT]
    assert state.goal.target == 1


def test_nothing_to_do_is_done_at_once() -> None:
    state, commands = scaling.begin("op", Goal(stay=(engine(0),)), LIMITS, 5.0)
    assert state.phase is Phase.DONE
    assert commands == (Command.REPORT,)
    assert state.transitions == (Transition(Phase.DONE, 5.0),)


def test_whoever_is_late_is_named() -> None:
    state, _ = scaling.begin("op", GROW, LIMITS, 0.0)
    state, _ = scaling.answered(state, Phase.RESERVE, Rank(2), 1.0)
    assert scaling.expired(state, 9.9)[0] is state
    state, commands = scaling.expired(state, 10.0)
    assert state.phase is Phase.ROLLING_BACK
    assert commands == (Command.UNDO,)
    assert state.laggards == (Rank(3),)
    assert state.error == "reserve: rank 3 took longer than 10 s"


def test_repeated_late_and_strange_answers_are_counted() -> None:
    state, _ = scaling.begin("op", GROW, LIMITS, 0.0)
    for rank in (2, 2, 7):
        state, commands = scaling.answered(state, Phase.RESERVE, Rank(rank), 0.0)
        assert not commands
    state, _ = scaling.answered(state, Phase.COMMIT, Rank(3), 0.0)
    assert state.ignored == 3
    assert state.waiting == {3}


def test_a_leaver_that_dies_is_not_waited_for() -> None:
    state, _ = scaling.begin("op", SHRINK, LIMITS, 0.0)
    state, _ = scaling.died(state, engine(0), "killed", 0.0)
    while state.phase is not Phase.RETIRE:
        state, _ = scaling.answered(state, state.phase, min(state.waiting), 0.0)
    assert state.waiting == {2}


def test_a_new_controller_finishes_what_was_decided_and_undoes_what_was_not() -> None:
    state, _ = scaling.begin("op", CHANGE, LIMITS, 0.0)
    undone, commands = scaling.taken_over(state, [], 0.0)
    assert undone.phase is Phase.ROLLING_BACK
    assert commands == (Command.UNDO,)
    finished, commands = scaling.taken_over(state, [engine(0)], 0.0)
    assert finished.phase is Phase.COMMIT
    assert commands == (Command.DECIDE,)


def test_only_what_is_being_committed_can_come_back_and_says_why() -> None:
    state, _ = scaling.begin("op", GROW, LIMITS, 0.0)
    for phase in (Phase.RESERVE, Phase.SPAWN, Phase.PREPARE, Phase.READY):
        assert scaling.returned(state, "rank 2 died", 0.0) == (state, ())
        for rank in sorted(state.waiting):
            state, _ = scaling.answered(state, phase, rank, 0.0, engine(rank) if phase is Phase.SPAWN else None)
    assert state.phase is Phase.COMMIT
    back, commands = scaling.returned(state, "rank 2 died", 0.0)
    assert (back.phase, back.error, commands) == (Phase.ROLLING_BACK, "commit: rank 2 died", (Command.UNDO,))
    for rank in sorted(state.waiting):
        state, _ = scaling.answered(state, Phase.COMMIT, rank, 0.0)
    assert scaling.returned(state, "rank 2 died", 0.0) == (state, ()), "released"
