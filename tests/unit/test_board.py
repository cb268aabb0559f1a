"""The coordinator's board: loads are not starved, waves are told at once, who runs is what ranks report."""

from __future__ import annotations

import itertools

from raycore.board import PUBLISH_INTERVAL_S, QUIET_INTERVAL_S, Board
from raycore.engine import EngineLoad
from raycore.ids import EngineId, Epoch, GroupStamp, Incarnation, Rank, Term
from raycore.messages import Beat, Wake, WaveReport
from raycore.waves import Phase

STAMP = GroupStamp(Epoch(1), Term(1))
ENGINES = [EngineId(Rank(rank), Incarnation(f"i{rank}")) for rank in range(3)]


def beat(rank: int, seq: int, *, running: int = 0, phase: Phase | None = None, wave: int = 0, stamp: GroupStamp = STAMP) -> Beat:
    report = None if phase is None else WaveReport(stamp, phase, wave, seq)
    return Beat(ENGINES[rank], seq, 0, "", 0.0, 0.0, EngineLoad(running=running), wave=report)


def board() -> Board:
    made = Board()
    made.set_members(ENGINES)
    return made


def test_loads_are_published_every_interval_under_continuous_traffic_and_no_more_often() -> None:
    watched, published = board(), []
    for tick in range(1000):  # a beat of each rank every millisecond
        now_s = tick / 1000
        for rank in range(3):
            watched.hear(beat(rank, tick, running=tick), now_s)
        snapshot = watched.due(now_s)
        if snapshot is not None:
            published.append((now_s, snapshot))
    gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(published)]
    assert min(gaps) >= PUBLISH_INTERVAL_S - 1e-9
    assert max(gaps) <= PUBLISH_INTERVAL_S + 0.002
    assert [load.load.running for load in published[-1][1].loads] == [round(published[-1][0] * 1000)] * 3
    assert [snapshot.seq for _, snapshot in published] == list(range(1, len(published) + 1))


def test_an_unchanged_board_is_published_now_and_then() -> None:
    watched = board()
    watched.hear(beat(0, 1), 0.0)
    times = [tick / 100 for tick in range(500) if watched.due(tick / 100) is not None]
    assert times == [0.0, *(QUIET_INTERVAL_S * n for n in range(1, 5))]


def test_a_wave_that_starts_or_ends_is_published_at_once() -> None:
    watched = board()
    for rank in range(3):
        watched.hear(beat(rank, 1, phase=Phase.RESTING), 0.0)
    assert watched.due(0.0) is not None
    watched.hear(beat(1, 2, phase=Phase.STEPPING), 0.001)
    started = watched.due(0.001)
    assert started is not None
    assert started.is_running
    watched.hear(beat(1, 3, phase=Phase.RESTING, wave=1), 0.002)
    ended = watched.due(0.002)
    assert ended is not None
    assert (ended.is_running, ended.wave) == (False, 1)
    assert watched.due(0.003) is None


def test_ranks_that_rest_while_one_reports_their_wave_are_woken() -> None:
    watched = board()
    for rank in range(3):
        assert watched.hear(beat(rank, 1, phase=Phase.RESTING, wave=4), 0.0) == []
    assert watched.hear(beat(1, 2, phase=Phase.STEPPING, wave=4), 0.1) == [(ENGINES[0], Wake(STAMP, 4)), (ENGINES[2], Wake(STAMP, 4))]
    assert watched.hear(beat(0, 2, phase=Phase.STEPPING, wave=4), 0.1) == [(ENGINES[2], Wake(STAMP, 4))]
    assert watched.hear(beat(0, 3, phase=Phase.STEPPING, wave=4), 0.2) != [], "every report is a reason to try again"
    assert watched.hear(beat(2, 2, phase=Phase.RESTING, wave=5), 0.2) == []


def test_having_woken_somebody_does_not_make_the_pool_run() -> None:
    watched = board()
    watched.hear(beat(0, 1, phase=Phase.STEPPING), 0.0)
    watched.hear(beat(1, 1, phase=Phase.RESTING), 0.0)
    watched.hear(beat(0, 2, phase=Phase.BROKEN), 0.1)
    assert not watched.running().is_running


def test_reports_of_an_older_group_do_not_count() -> None:
    newer = GroupStamp(Epoch(2), Term(1))
    watched = board()
    watched.hear(beat(0, 1, phase=Phase.STEPPING, wave=9), 0.0)
    watched.hear(beat(1, 1, phase=Phase.RESTING, wave=0, stamp=newer), 0.0)
    assert watched.running() == (newer, 0, False)
    assert watched.hear(beat(2, 1, phase=Phase.STEPPING, wave=0, stamp=newer), 0.0) == [(ENGINES[1], Wake(newer, 0))]


def test_strangers_old_beats_and_former_members_are_not_heard() -> None:
    watched = board()
    stranger = Beat(EngineId(Rank(0), Incarnation("other")), 1, 0, "", 0.0, 0.0, EngineLoad(running=99))
    assert watched.hear(stranger, 0.0) == []
    watched.hear(beat(0, 5, running=5), 0.0)
    watched.hear(beat(0, 4, running=4), 0.0)
    watched.hear(beat(1, 1, running=1), 0.0)
    assert [(load.engine, load.load.running) for load in watched.snapshot(1.0).loads] == [(ENGINES[0], 5), (ENGINES[1], 1)]
    assert watched.snapshot(1.0).loads[0].age_s == 1.0
    watched.set_members(ENGINES[1:])
    assert [load.engine for load in watched.snapshot(1.0).loads] == [ENGINES[1]]
