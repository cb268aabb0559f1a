"""Every order of events of ranks in lockstep, by search: no strand, no round with ranks at different places, and rest in the end."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator

import pytest

from raycore import waves
from raycore.ids import GroupStamp, Rank
from raycore.waves import Phase, Wave, WaveError, WaveStep, on_standby, on_told
from tests.support import wave_model
from tests.support.wave_model import (
    Move,
    World,
    give_back,
    inner_moves,
    may_prepare,
    new_world,
    next_towards_rest,
    outer_moves,
    replace,
    stamp,
    stand_by,
    why_not_rested,
)

_EVENTS = 3
_MOVES_TO_REST = 300
"""Far more than it takes three ranks to finish what they have and to mend a group."""


def search(start: World, events: int, *, alike: tuple[int, ...] = ()) -> int:
    """Visit every state that can be reached with so many events from outside; from each, all must come to rest. Returns how many there are.

    `alike`: ranks that differ by nothing in the beginning, so that a first event at one of them stands for all. A state that was reached
    with fewer events is not visited again with more: what follows was seen already.
    """
    trails: dict[World, tuple[World, str] | None] = {start: None}
    at_rest: set[World] = set()
    frontier = [start]
    gc.disable()  # there is nothing to collect, and it would look through every state again and again
    try:
        for events_left in range(events, -1, -1):
            reached = _closure(frontier, trails, at_rest)
            if events_left:
                frontier = _asked(reached, trails, alike if events_left == events else ())
    finally:
        gc.enable()
    return len(trails)


def _closure(frontier: list[World], trails: dict[World, tuple[World, str] | None], at_rest: set[World]) -> list[World]:
    """All that follows from these by itself, them included."""
    reached: list[World] = []
    while frontier:
        here = frontier.pop()
        reached.append(here)
        try:
            _comes_to_rest(here, at_rest)
            found = list(inner_moves(here))
        except (AssertionError, WaveError) as error:
            pytest.fail(f"{error}\n" + "\n".join(_trail(here, trails)))
        frontier += _new(here, found, trails)
    return reached


def _asked(reached: list[World], trails: dict[World, tuple[World, str] | None], alike: tuple[int, ...]) -> list[World]:
    """All that follows from one event more."""
    frontier: list[World] = []
    for here in reached:
        asked = outer_moves(here)
        frontier += _new(here, _first_of_each_kind(asked, alike) if alike else asked, trails)
    return frontier


def _new(here: World, moves: Iterable[Move], trails: dict[World, tuple[World, str] | None]) -> list[World]:
    new: list[World] = []
    for name, there in moves:
        if there not in trails:
            trails[there] = (here, name)
            new.append(there)
    return new


def _first_of_each_kind(moves: Iterable[Move], alike: tuple[int, ...]) -> Iterator[Move]:
    """Without those that concern another rank of the same kind: their names differ by the rank's number only."""
    known: set[str] = set()
    for name, world in moves:
        event, _, group = name.partition("decided: ")
        kind = "".join("=" if letter.isdigit() and int(letter) in alike else letter for letter in event)
        kind += str(sorted(("=" if rank in alike else str(rank)) for rank in world.decided[-1])) if group else ""
        if kind not in known:
            known.add(kind)
            yield name, world


def _comes_to_rest(world: World, at_rest: set[World]) -> None:
    path: list[World] = []
    while world not in at_rest:
        path.append(world)
        assert len(path) < _MOVES_TO_REST, "no rest"
        move = next_towards_rest(world)
        if move is None:
            problem = why_not_rested(world)
            assert problem is None, problem
            break
        world = move[1]
    at_rest.update(path)


def _trail(world: World, trails: dict[World, tuple[World, str] | None]) -> list[str]:
    names: list[str] = []
    while (before := trails[world]) is not None:
        world, name = before
        names.append(name)
    return names[::-1]


@pytest.mark.parametrize(
    ("members", "at_least"),
    [
        pytest.param((0, 1, 2), 100_000, id="three members"),
        pytest.param((0, 1), 30_000, id="two members and one that may join"),
    ],
)
@pytest.mark.timeout(600)
def test_no_order_of_three_events_strands_work_or_mixes_rounds(members: tuple[int, ...], at_least: int) -> None:
    assert search(new_world(members, 3), _EVENTS, alike=members) > at_least


@pytest.mark.timeout(300)
def test_nor_does_any_when_ranks_agree_every_second_step() -> None:
    assert search(new_world((0, 1), 2, sync_interval=2), _EVENTS) > 1_000


STARTS = {
    "two members and a joiner": ((0, 1), (0, 1, 2)),
    "three members, one of whom leaves": ((0, 1, 2), (1, 2)),
    "one joins and one leaves": ((0, 1), (1, 2)),
}


def prepared(members: tuple[int, ...], then: tuple[int, ...]) -> World:
    """Everybody has the standby group of `then`; nothing is decided."""
    world = stand_by(new_world(members, 3)._replace(has_switches=True), tuple(map(Rank, then)))
    for me, rank in enumerate(world.ranks):
        if may_prepare(world, me, rank):
            wave = on_standby(rank.wave, stamp(world.standby), world.decided[world.standby]).wave
            world = replace(world, me, rank._replace(wave=wave))
    return world


def decided(start: str, *, paused: bool = False) -> World:
    """The switch is decided and nobody is told yet."""
    world = prepared(*STARTS[start])._replace(is_gone_for=True)
    return replace(world, 1, world.ranks[1]._replace(has_work=True, is_paused=True)) if paused else world


def joiner_lost(world: World) -> World:
    return replace(world, 2, world.ranks[2]._replace(is_alive=False))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.timeout(300)
def test_no_order_of_events_around_a_switch_strands_work_or_mixes_rounds(start: str) -> None:
    """Work or a death at any moment; the standby's undoing is one of the states of `prepared`."""
    assert search(prepared(*STARTS[start]), 1) > 400
    assert search(decided(start), 1) > 5_000


def test_nor_does_any_when_a_paused_rank_has_work() -> None:
    assert search(decided("two members and a joiner", paused=True), 0) > 200


@pytest.mark.timeout(300)
def test_nor_does_any_when_a_joiner_is_lost_and_the_others_go_back_to_their_group() -> None:
    lost = joiner_lost(decided("two members and a joiner"))
    assert search(lost, 1) > 500
    assert search(give_back(lost), 1) > 500


def test_a_search_finds_ranks_that_go_back_at_different_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(wave: Wave, to: GroupStamp) -> WaveStep:
        return WaveStep(Wave(wave.me, to, wave.kept or wave.members, Phase.RESTING))

    monkeypatch.setattr(wave_model, "on_returned", at_once)
    with pytest.raises(pytest.fail.Exception, match=r"in flight|different stamps"):
        search(give_back(joiner_lost(decided("two members and a joiner"))), 1)


def test_a_search_finds_a_rank_that_switches_without_a_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(wave: Wave, to: GroupStamp) -> WaveStep:
        step = on_told(wave, to)
        return WaveStep(waves._switched(step.wave, keeps=True)) if step.wave.is_decided else step

    monkeypatch.setattr(wave_model, "on_told", at_once)
    with pytest.raises(pytest.fail.Exception, match="in flight"):
        search(decided("two members and a joiner"), 1)


def test_a_search_finds_a_strand_when_nobody_repeats_the_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wave, "owns_wake", property(lambda _wave: False))
    with pytest.raises(pytest.fail.Exception, match=r"does not rest|nothing happens"):
        search(new_world((0, 1), 2), 1)
