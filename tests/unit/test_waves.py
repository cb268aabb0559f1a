"""The wave machine event by event: what is stale changes nothing, what cannot be raises, and what the sums of a round say."""

from __future__ import annotations

import pytest

from raycore.ids import Epoch, GroupStamp, Rank, Term
from raycore.waves import (
    ROUND_WIDTH,
    Phase,
    Verdict,
    Vote,
    Wave,
    WaveError,
    ballot,
    on_failed,
    on_group,
    on_reduced,
    on_reducing,
    on_standby,
    on_step,
    on_told,
    on_wake,
    on_work,
    verdict,
)

NOW = GroupStamp(Epoch(4), Term(2))
OLDER = [GroupStamp(Epoch(3), Term(2)), GroupStamp(Epoch(9), Term(1)), GroupStamp(Epoch(4), Term(1))]
GOES_ON = Verdict(goes_on=True, has_work=True, paused=0, carried=())
ENDS = Verdict(goes_on=False, has_work=False, paused=0, carried=())
NEWER = [GroupStamp(Epoch(5), Term(2)), GroupStamp(Epoch(1), Term(3))]
THREE = (Rank(0), Rank(2), Rank(5))


def resting(number: int = 7) -> Wave:
    return Wave(Rank(2), NOW, THREE, Phase.RESTING, number)


def stepping() -> Wave:
    return on_work(resting()).wave


@pytest.mark.parametrize("wave", [resting(), stepping(), on_reducing(stepping()).wave, on_failed(stepping(), NOW).wave])
@pytest.mark.parametrize("stamp", OLDER)
def test_what_is_of_an_older_group_changes_nothing(wave: Wave, stamp: GroupStamp) -> None:
    for step in (on_wake(wave, stamp, 7), on_told(wave, stamp), on_group(wave, stamp, THREE), on_failed(wave, stamp)):
        assert step.is_stale
        assert step.wave == wave
    assert on_reduced(wave, stamp, GOES_ON).wave == wave


@pytest.mark.parametrize("wave", [resting(), stepping()])
def test_a_wake_of_a_group_not_told_of_yet_or_of_a_wave_that_is_over_changes_nothing(wave: Wave) -> None:
    for step in (*(on_wake(wave, stamp, 7) for stamp in NEWER), on_wake(wave, NOW, 6)):
        assert step.is_stale
        assert step.wave == wave


def test_a_repeated_wake_changes_nothing() -> None:
    woken = on_wake(resting(), NOW, 7).wave
    assert woken.phase is Phase.STEPPING
    assert on_wake(woken, NOW, 7).wave == woken


def test_a_wake_of_the_next_wave_is_kept_until_this_one_ends() -> None:
    wave = on_wake(on_reducing(stepping()).wave, NOW, 8).wave
    ended = on_reduced(wave, NOW, ENDS)
    assert ended.has_ended
    assert (ended.wave.phase, ended.wave.wave, ended.wave.round, ended.wave.wanted) == (Phase.STEPPING, 8, 0, -1)


@pytest.mark.parametrize(("wave", "number"), [(resting(), 8), (stepping(), 9)])
def test_a_peer_that_is_where_it_cannot_be_breaks_the_group(wave: Wave, number: int) -> None:
    assert on_wake(wave, NOW, number).wave.phase is Phase.BROKEN


@pytest.mark.parametrize("stamp", NEWER)
def test_a_newer_group_ends_whatever_went_on_and_begins_with_wave_0(stamp: GroupStamp) -> None:
    told = on_told(on_reducing(stepping()).wave, stamp).wave
    assert (told.phase, told.stamp, told.is_reducing) == (Phase.OUT, stamp, False)
    assert on_work(told).wave == told, "without a group nothing starts"
    formed = on_group(told, stamp, THREE).wave
    assert (formed.phase, formed.wave, formed.round) == (Phase.RESTING, 0, 0)


def test_a_broken_group_is_mended_by_a_newer_one_only() -> None:
    broken = on_failed(stepping(), NOW).wave
    assert on_group(broken, NOW, THREE).wave == broken
    assert on_work(broken).wave == broken
    assert on_group(broken, NEWER[0], THREE).wave.phase is Phase.RESTING


@pytest.mark.parametrize(
    "event",
    [
        lambda: on_reducing(resting()),
        lambda: on_reducing(on_reducing(stepping()).wave),
        lambda: on_reduced(stepping(), NOW, GOES_ON),
        lambda: on_step(stepping()),
        lambda: on_step(resting()),
        lambda: on_group(Wave(Rank(1)), NOW, THREE),
    ],
)
def test_what_cannot_come_in_a_state_raises(event: object) -> None:
    with pytest.raises(WaveError):
        event()  # type: ignore[operator]


def test_after_a_round_that_goes_on_as_many_steps_are_due_as_the_interval_says() -> None:
    wave = on_reducing(Wave(Rank(2), NOW, THREE, Phase.STEPPING, sync_interval=2)).wave
    wave = on_reduced(wave, NOW, GOES_ON).wave
    assert (wave.steps_due, wave.may_step, wave.may_reduce) == (2, True, False)
    wave = on_step(on_step(wave).wave).wave
    assert (wave.may_step, wave.may_reduce, wave.round) == (False, True, 1)


def sums(*ballots: list[int]) -> list[int]:
    return [sum(column) for column in zip(*ballots, strict=True)]


def test_a_wave_goes_on_while_somebody_has_work() -> None:
    wave = stepping()
    idle, busy = ballot(wave, has_work=False, is_paused=True), ballot(wave, has_work=True, is_paused=False)
    assert len(idle) == ROUND_WIDTH
    assert not verdict(wave, sums(idle, idle, idle)).goes_on
    assert verdict(wave, sums(idle, busy, idle)).goes_on
    assert verdict(wave, sums(idle, busy, idle)).paused == 2


def test_a_wave_goes_on_while_a_vote_is_open_and_a_vote_is_carried_by_all() -> None:
    wave = stepping()
    voting = on_told(on_standby(wave, NEWER[0], THREE).wave, NEWER[0]).wave
    yes, no = ballot(voting, has_work=False, is_paused=False), ballot(wave, has_work=False, is_paused=False)
    assert verdict(wave, sums(yes, no, yes)) == verdict(wave, sums(no, yes, yes))
    assert verdict(wave, sums(yes, no, yes)).goes_on
    assert verdict(wave, sums(yes, no, yes)).carried == ()
    assert not verdict(wave, sums(yes, yes, yes)).goes_on
    assert verdict(wave, sums(yes, yes, yes)).carried == (Vote.SWITCH,)


def test_ranks_that_meet_at_different_places_are_found_out() -> None:
    wave = stepping()
    elsewhere = ballot(on_reduced(on_reducing(wave).wave, NOW, GOES_ON).wave, has_work=False, is_paused=False)
    here = ballot(wave, has_work=False, is_paused=False)
    with pytest.raises(WaveError, match="not in the same round"):
        verdict(wave, sums(here, here, elsewhere))
