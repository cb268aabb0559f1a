"""What a controller tells of its pool: phases and their seconds once each, deaths, gauges of the ranks that serve, loads that changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.pool_observer import PoolObserver, PoolView
from actors.roster import first_membership, with_states, without
from elastic import operation as machine
from elastic.operation import Goal, Operation, Phase
from raycore import metrics
from raycore.engine import EngineLoad
from raycore.event_log import EventLog, read_log
from raycore.events import Began, Died, Ended, Event, LoadSeen, PhaseBegan, RankState, Stamp
from raycore.ids import EngineId, Incarnation, Rank
from raycore.membership import Departure, Endpoints, Membership, MemberState
from raycore.messages import Beat
from raycore.metrics import Metric
from tests.actors.test_roster import member

LIMITS = dict.fromkeys(Phase, 10.0)


class Sink:
    """Keeps what it is given, as the agent does: the last value of each gauge, the sum of each counter, each observation."""

    def __init__(self) -> None:
        self.found: list[tuple[Metric, float, dict[str, str]]] = []

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        assert {*metric.tags} <= {*tags} <= {*metric.tags, "node_ip"}
        self.found.append((metric, value, dict(tags)))

    def of(self, metric: Metric, **tags: str) -> list[float]:
        return [value for found, value, given in self.found if found is metric and tags.items() <= given.items()]


class Watched:
    """An observer with a file and a sink."""

    def __init__(self, directory: Path) -> None:
        self.sink = Sink()
        self._file = directory / "chat.jsonl"
        log = EventLog(directory, "chat")
        self.observer = PoolObserver(
            Stamp("chat", "1f"), engine="echo", model="tiny", node_ip="10.0.0.9", sink=self.sink, log=log, clock=lambda: 50.0
        )

    def events(self, kind: type[Event] | None = None) -> list[Any]:
        return [event for event in read_log(self._file) if kind is None or isinstance(event, kind)]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def beat(rank: int, **facts: Any) -> Beat:
    load = EngineLoad(running=facts.pop("running", 0), waiting=facts.pop("waiting", 0), kv_tokens_used=facts.pop("kv", 0))
    return Beat(member(rank).engine, 1, 1, "", 0.0, 0.0, load, **facts)


def view(membership: Membership, *beats: Beat, target: int = 0, standbys: int = 0) -> PoolView:
    return PoolView(membership, target, standbys, {each.engine: each for each in beats})


def grow(watched: Watched) -> Operation:
    """One rank joins, to its end."""
    joiner = EngineId(Rank(1), Incarnation("b"))
    state, _ = machine.begin("chat-1", Goal((member(0).engine,), (Rank(1),)), LIMITS, 0.0)
    watched.observer.on_operation(None, state)
    for phase, rank, engine, at_s in (
        (Phase.RESERVE, 1, None, 1.0),
        (Phase.SPAWN, 1, joiner, 4.0),
        (Phase.PREPARE, 0, None, 4.5),
        (Phase.PREPARE, 1, None, 5.0),
        (Phase.READY, 1, None, 6.0),
        (Phase.COMMIT, 0, None, 6.0),
        (Phase.COMMIT, 1, None, 7.0),
    ):
        before = state
        state, _ = machine.answered(state, phase, Rank(rank), at_s, engine)
        watched.observer.on_operation(before, state)
    assert state.phase is Phase.DONE
    return state


def test_each_phase_is_an_event_and_each_one_s_seconds_are_observed_once(watched: Watched) -> None:
    grow(watched)
    found: list[PhaseBegan] = watched.events(PhaseBegan)
    assert [event.phase for event in found] == ["reserve", "spawn", "prepare", "ready", "commit", "retire", "done"]
    assert {(event.target, event.joining, event.error) for event in found} == {(2, (1,), "")}
    seconds = {phase: watched.sink.of(metrics.SCALE_DURATION, phase=phase) for phase in ("reserve", "spawn", "prepare", "ready", "commit")}
    assert seconds == {"reserve": [1.0], "spawn": [3.0], "prepare": [1.0], "ready": [1.0], "commit": [1.0]}
    assert watched.sink.of(metrics.SCALE_OPERATIONS, outcome="done") == [1]


def test_an_operation_that_fails_is_undone_with_its_error(watched: Watched) -> None:
    state, _ = machine.begin("chat-2", Goal((member(0).engine,), (Rank(1),)), LIMITS, 0.0)
    watched.observer.on_operation(None, state)
    failed, _ = machine.failed(state, "no room", 2.0)
    watched.observer.on_operation(state, failed)
    undone = failed
    for rank in sorted(failed.waiting):
        before = undone
        undone, _ = machine.answered(undone, Phase.ROLLING_BACK, rank, 3.0)
        watched.observer.on_operation(before, undone)
    found: list[PhaseBegan] = watched.events(PhaseBegan)
    assert [(event.phase, event.error) for event in found] == [
        ("reserve", ""),
        ("rolling_back", "reserve: no room"),
        ("undone", "reserve: no room"),
    ]
    assert watched.sink.of(metrics.SCALE_OPERATIONS, outcome="undone") == [1]
    assert watched.sink.of(metrics.SCALE_DURATION, phase="rolling_back") == [1.0]


def test_an_operation_with_nothing_to_do_is_not_told(watched: Watched) -> None:
    state, _ = machine.begin("chat-3", Goal((member(0).engine,)), LIMITS, 0.0)
    watched.observer.on_operation(None, state)
    assert watched.events() == []
    assert watched.sink.found == []


def test_a_death_is_counted_by_its_kind(watched: Watched) -> None:
    before = first_membership("chat", [member(0), member(1)])
    watched.observer.on_membership(before, without(before, [Departure(member(1).engine, "its node died")]))
    assert watched.sink.of(metrics.ENGINE_DEATHS, cause="node", dp_rank="1") == [1]
    assert [event.cause for event in watched.events(Died)] == ["its node died"]


def test_gauges_are_of_who_serves_and_of_each_rank_on_its_own_node(watched: Watched) -> None:
    far = msgspec.structs.replace(member(1), endpoints=Endpoints("far", "ipc://r", "ipc://b", "tcp://10.0.0.7:5001"))
    both = first_membership("chat", [member(0), far])
    leaving = with_states(both, {far.engine: MemberState.LEAVING})
    watched.observer.look(view(leaving, beat(0, running=3, waiting=2, kv=32), beat(1, is_paused=True), target=4, standbys=1))
    sink = watched.sink
    assert (sink.of(metrics.DP_SIZE), sink.of(metrics.DP_TARGET_SIZE), sink.of(metrics.STANDBYS)) == ([1], [4], [1])
    assert sink.of(metrics.REQUESTS_RUNNING, dp_rank="0", node_ip="10.0.0.9") == [3]
    assert sink.of(metrics.REQUESTS_WAITING, dp_rank="0") == [2]
    assert sink.of(metrics.KV_CACHE_USAGE, dp_rank="0") == [0.5]
    assert sink.of(metrics.IS_PAUSED, dp_rank="1", node_ip="10.0.0.7") == [1]
    assert sink.of(metrics.IS_SLEEPING, dp_rank="1") == [0]


def test_a_rank_that_was_not_heard_has_no_load(watched: Watched) -> None:
    watched.observer.look(view(first_membership("chat", [member(0), member(1)]), beat(1, running=1)))
    assert watched.sink.of(metrics.REQUESTS_RUNNING, dp_rank="0") == []
    assert watched.sink.of(metrics.DP_TARGET_SIZE) == [2], "nobody asked for another size"
    assert [event.ranks for event in watched.events(LoadSeen)] == [{1: (1, 0, 0.0)}]


def test_a_load_is_told_when_it_changed_and_a_pause_when_it_begins_and_ends(watched: Watched) -> None:
    one = first_membership("chat", [member(0)])
    for facts in ({}, {"running": 1}, {"running": 1}, {"running": 1, "is_paused": True}, {"running": 1, "is_paused": True}, {}):
        watched.observer.look(view(one, beat(0, **facts)))
    assert [event.ranks[0][0] for event in watched.events(LoadSeen)] == [0, 1, 0]
    assert [event.is_paused for event in watched.events(RankState)] == [True, False]


def test_a_life_has_a_beginning_and_an_end(watched: Watched) -> None:
    watched.observer.began(1, recovered=False)
    watched.observer.began(2, recovered=True)
    watched.observer.ended()
    first, again, last = watched.events()
    assert isinstance(first, Began)
    assert (first.engine, first.model, first.recovered, again.recovered) == ("echo", "tiny", False, True)
    assert isinstance(last, Ended)


def test_without_file_and_sink_nothing_happens() -> None:
    observer = PoolObserver(Stamp("chat", "1f"), engine="echo", model="echo", node_ip="", sink=None, log=None)
    observer.began(1, recovered=False)
    observer.look(view(first_membership("chat", [member(0)]), beat(0)))
    observer.ended()
