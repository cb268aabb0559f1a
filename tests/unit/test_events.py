"""Events of a pool: what follows from two decisions, kinds of deaths, lines that can be read again, files that stay small."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import msgspec
import pytest

from actors.remote import _DEATHS
from actors.roster import first_membership, with_members, with_states, without, without_engine
from raycore import event_log
from raycore.errors import ConfigurationError
from raycore.event_log import FILES_KEPT, EventLog, event_directory, find_log, last_life, read_log
from raycore.events import (
    DEATH_KINDS,
    OTHER,
    Began,
    Died,
    Ended,
    EpochBegan,
    Event,
    Joined,
    Left,
    LoadSeen,
    PhaseBegan,
    RankState,
    Stamp,
    decode_lines,
    describe,
    encode,
    kind_of,
    line_for_people,
    membership_events,
)
from raycore.health import EngineHealth, Verdict, explain
from raycore.membership import Departure, Membership, MemberState
from tests.actors.test_roster import INFO, member

STAMP = Stamp("chat", "1f")
FACTS = {"at_s": 1000.25, "pool": "chat", "life": "1f"}
EVERY: list[Event] = [
    Began(**FACTS, engine="torch", model="smollm2", term=1),
    Began(**FACTS, engine="torch", model="smollm2", term=2, recovered=True),
    EpochBegan(**FACTS, epoch=3, term=1, ranks=(0, 2), leaving=(1,)),
    Joined(**FACTS, rank=2, incarnation="ab", node_ip="10.0.0.1"),
    Left(**FACTS, rank=1, incarnation="cd"),
    Died(**FACTS, rank=0, incarnation="ef", cause="hung: no beat for 6.0 s", kind="hang"),
    PhaseBegan(**FACTS, operation="chat-1-aa", phase="undone", target=3, joining=(2,), error="spawn: no"),
    RankState(**FACTS, rank=0, is_paused=True, is_sleeping=False),
    RankState(**FACTS, rank=0, is_paused=False, is_sleeping=False),
    LoadSeen(**FACTS, ranks={0: (3, 1, 0.5)}),
    Ended(**FACTS),
]


def events_between(before: Membership, after: Membership) -> list[Event]:
    return membership_events(before, after, 1000.0, STAMP, {2: "10.0.0.2"})


def test_a_first_decision_is_joiners_and_an_epoch() -> None:
    found = events_between(Membership("chat"), first_membership("chat", [member(0), member(2)]))
    assert [(type(event), getattr(event, "rank", None)) for event in found] == [(Joined, 0), (Joined, 2), (EpochBegan, None)]
    assert isinstance(found[1], Joined)
    assert found[1].node_ip == "10.0.0.2"
    assert isinstance(found[2], EpochBegan)
    assert (found[2].epoch, found[2].ranks) == (1, (0, 2))


def test_a_loss_is_a_death_with_its_cause_and_is_told_once() -> None:
    before = first_membership("chat", [member(0), member(1)])
    after = without(before, [Departure(member(1).engine, "hung: no beat for 6.0 s")])
    found = events_between(before, after)
    assert [type(event) for event in found] == [Died, EpochBegan]
    assert isinstance(found[0], Died)
    assert (found[0].rank, found[0].kind) == (1, "hang")
    joined = with_members(after, [member(1, "b")])
    assert [type(event) for event in events_between(after, joined)] == [Joined, EpochBegan], "the departure was known"


def test_who_is_lost_with_another_is_counted_as_that() -> None:
    info = msgspec.structs.replace(INFO, sync_interval=1, is_expert_parallel=True)
    before = first_membership("chat", [msgspec.structs.replace(member(rank), info=info) for rank in range(2)])
    found = events_between(before, without(before, [Departure(member(1).engine, "its node died")]))
    assert {(event.rank, event.kind) for event in found if isinstance(event, Died)} == {(1, "node"), (0, "other_rank")}


def test_who_leaves_by_choice_leaves_and_does_not_die() -> None:
    before = first_membership("chat", [member(0), member(1)])
    leaving = with_states(before, {member(1).engine: MemberState.LEAVING})
    (epoch,) = events_between(before, leaving)
    assert isinstance(epoch, EpochBegan)
    assert (epoch.ranks, epoch.leaving) == ((0,), (1,))
    found = events_between(leaving, without_engine(leaving, member(1).engine))
    assert [type(event) for event in found] == [Left, EpochBegan]


def test_the_same_decision_twice_is_nothing() -> None:
    same = first_membership("chat", [member(0)])
    assert events_between(same, same) == []


def test_every_cause_that_we_name_has_a_kind() -> None:
    causes = [meaning for _, meaning in _DEATHS]
    causes += [explain(EngineHealth(0.0), verdict, 9.0) for verdict in (Verdict.NO_BEATS, Verdict.OVER_BUDGET)]
    causes += ["its step loop ended", "its step loop failed: ValueError: x", "it did not go over to the new groups: late"]
    unknown = {cause for cause in causes if kind_of(cause) == OTHER}
    assert unknown == {"its owner died", "its placement group was removed"}
    assert len({kind for _, kind in DEATH_KINDS}) < 10, "a tag has few values"


@pytest.mark.parametrize("event", EVERY, ids=lambda event: type(event).__name__)
def test_an_event_is_a_line_that_can_be_read_again(event: Event) -> None:
    line = encode(event)
    assert line.count(b"\n") == 1
    assert list(decode_lines([line])) == [event]
    assert line_for_people(event).endswith(describe(event))
    assert "chat" in line_for_people(event)


def test_a_torn_line_and_one_of_the_future_are_passed_over() -> None:
    lines = [encode(EVERY[0])[:20], b'{"event":"merged","at_s":1,"pool":"chat","life":"1f"}\n', b"\xff\n", encode(EVERY[-1])]
    assert list(decode_lines(lines)) == [EVERY[-1]]


# -- files ------------------------------------------------------------------------------------------------------------------


def test_a_log_is_its_owner_s_alone_and_is_added_to(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "events"
    for event in EVERY[:2]:
        log = EventLog(directory, "chat")
        log.append(event)
        log.close()
    file = directory / "chat.jsonl"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(read_log(file)) == EVERY[:2]
    log.append(EVERY[0])  # closed: nothing, and no error
    assert len(list(read_log(file))) == 2


def test_a_log_never_takes_more_than_twice_its_size(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "chat", most_bytes=2000)
    for number in range(300):
        log.append(RankState(at_s=number, pool="chat", life="1f", rank=number, is_paused=True, is_sleeping=False))
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "chat.jsonl.1"]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    found = [event.rank for event in read_log(tmp_path / "chat.jsonl") if isinstance(event, RankState)]
    assert found == list(range(300))[-len(found) :], "the newest, in order"
    assert len(found) > 15


def test_a_directory_keeps_the_latest_pools(tmp_path: Path) -> None:
    for number in range(FILES_KEPT + 20):
        path = tmp_path / f"generate-{number}.jsonl"
        path.touch()
        os.utime(path, (number, number))
    EventLog(tmp_path, "chat").close()
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == FILES_KEPT
    assert {"chat.jsonl", f"generate-{FILES_KEPT + 19}.jsonl"} <= names
    assert "generate-0.jsonl" not in names


def test_what_cannot_be_written_is_said_once_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        log = EventLog(tmp_path / "file", "chat")
        for event in EVERY:
            log.append(event)
        log.close()
    assert len(caplog.records) == 1
    assert "no event log" in caplog.text


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").symlink_to(tmp_path / "elsewhere")
    EventLog(tmp_path, "chat").append(EVERY[0])
    assert not (tmp_path / "elsewhere").exists()


def test_the_setting_names_a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert event_directory("off") is None
    assert event_directory(str(tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert event_directory("auto") == tmp_path / "raycore" / "events"


def test_logs_are_found_by_pool_by_file_and_as_the_newest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYCORE_EVENT_LOG", str(tmp_path))
    with pytest.raises(ConfigurationError, match="no event log in"):
        find_log(None)
    for number, pool in enumerate(("new", "old")):
        (tmp_path / f"{pool}.jsonl").touch()
        os.utime(tmp_path / f"{pool}.jsonl", (100 - number, 100 - number))
    assert find_log(None) == find_log("new") == find_log(str(tmp_path / "new.jsonl")) == tmp_path / "new.jsonl"
    for name in ("missing", "../old", str(tmp_path / "missing.jsonl")):
        with pytest.raises(ConfigurationError):
            find_log(name)
    monkeypatch.setenv("RAYCORE_EVENT_LOG", event_log.OFF)
    with pytest.raises(ConfigurationError, match="is off"):
        find_log("new")


def test_the_last_life_is_that_of_the_last_event() -> None:
    other = msgspec.structs.replace(EVERY[0], life="2a")
    assert last_life(iter([*EVERY, other])) == [other]
    assert last_life(iter([])) == []
