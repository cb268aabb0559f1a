"""`raycore events`, `timeline` and `dashboard`, on a pool that is gone: no Ray, only its file."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raycore import cli, cli_observe
from raycore.event_log import EventLog
from raycore.events import Began, Ended, Joined, LoadSeen

FACTS = {"pool": "chat", "life": "2b"}
EVENTS = [
    Began(at_s=100.0, **FACTS, engine="echo", model="echo", term=1),
    Joined(at_s=100.5, **FACTS, rank=0, incarnation="a"),
    LoadSeen(at_s=101.0, **FACTS, ranks={0: (1, 0, 0.0)}),
    Ended(at_s=102.0, **FACTS),
]


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RAYCORE_EVENT_LOG", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    log = EventLog(tmp_path, "chat")
    log.append(Began(at_s=1.0, pool="chat", life="1a", engine="torch", model="old", term=1))
    for event in EVENTS:
        log.append(event)
    yield tmp_path
    log.close()


def test_events_are_those_of_the_last_life_without_loads(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["events", "chat"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(" chat ")[1] for line in lines] == [
        "the pool is up: engine echo, model echo, term 1",
        "rank 0 (a) joined",
        "the pool has ended",
    ]


def test_events_as_json_are_the_lines_of_the_file(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["events", str(logs / "chat.jsonl"), "--json", "--all", "--loads"]) == 0
    assert capfd.readouterr().out == (logs / "chat.jsonl").read_text()


def test_the_following_goes_on_where_the_file_ended_also_when_it_begins_anew(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = logs / "new.jsonl"
    log = EventLog(logs, "new", most_bytes=250)
    turns = threading.Semaphore(0)
    monkeypatch.setattr(cli_observe.time, "sleep", lambda _seconds: turns.release())
    following = cli_observe._follow(path, 0)
    for event in EVENTS:  # the third does not fit any more
        log.append(event)
        assert next(following) == event
    log.close()
    assert path.with_suffix(".jsonl.1").exists()


def test_a_timeline_is_drawn(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["timeline"]) == 0
    assert (logs / "chat-timeline.png").read_bytes().startswith(b"\x89PNG")
    assert "2.0 s" in capfd.readouterr().err
    assert cli.run(["timeline", "chat", "-o", str(logs / "other.png")]) == 0
    assert (logs / "other.png").exists()


@pytest.mark.parametrize("command", ["events", "timeline"])
def test_a_pool_that_nobody_wrote_about_is_one_line_and_exits_with_2(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "nobody"]) == 2
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1
    assert "'nobody'" in shown


def test_an_empty_log_has_no_picture(logs: Path) -> None:
    (logs / "empty.jsonl").touch()
    assert cli.run(["timeline", "empty"]) == 2


def test_the_dashboard_is_json() -> None:
    result = CliRunner().invoke(cli.app, ["dashboard"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["uid"] == "raycore-pools"
