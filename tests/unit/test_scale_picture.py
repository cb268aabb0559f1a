"""The scale picture: what of a pool's events is drawn where."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from raycore.events import Began, Died, Ended, EpochBegan, Event, Joined, LoadSeen, PhaseBegan, RankState
from raycore.scale_picture import Mark, Span, Stretch, picture_of, write_png


def facts(at_s: float) -> dict[str, Any]:
    return {"at_s": 1000.0 + at_s, "pool": "chat", "life": "1f"}


def phase(at_s: float, operation: str, name: str) -> PhaseBegan:
    return PhaseBegan(**facts(at_s), operation=operation, phase=name, target=3)


LIFE: list[Event] = [
    Began(**facts(0), engine="echo", model="echo", term=1),
    Joined(**facts(0), rank=0, incarnation="a"),
    EpochBegan(**facts(0), epoch=1, term=1, ranks=(0, 1)),
    LoadSeen(**facts(1), ranks={0: (3, 2, 0.1), 1: (4, 0, 0.1)}),
    phase(2, "up", "reserve"),
    phase(3, "up", "spawn"),
    RankState(**facts(4), rank=0, is_paused=True, is_sleeping=False),
    RankState(**facts(5), rank=1, is_paused=True, is_sleeping=True),
    phase(6, "up", "rolling_back"),
    phase(7, "up", "undone"),
    Died(**facts(8), rank=1, incarnation="b", cause="killed", kind="killed"),
    EpochBegan(**facts(8), epoch=2, term=1, ranks=(0,)),
    LoadSeen(**facts(9), ranks={0: (7, 0, 0.2)}),
    RankState(**facts(10), rank=0, is_paused=False, is_sleeping=False),
    Began(**facts(11), engine="echo", model="echo", term=2, recovered=True),
    phase(12, "again", "reserve"),
    RankState(**facts(13), rank=0, is_paused=False, is_sleeping=True),
    Ended(**facts(15)),
]


def test_everything_has_its_place_and_its_time() -> None:
    picture = picture_of(LIFE)
    assert (picture.pool, picture.began_at_s, picture.end_s) == ("chat", 1000.0, 15.0)
    assert picture.sizes == ((0.0, 2), (8.0, 1), (15.0, 0))
    assert picture.spans == (
        Span("up", "reserve", 2.0, 3.0),
        Span("up", "spawn", 3.0, 6.0),
        Span("up", "rolling_back", 6.0, 7.0),
        Span("again", "reserve", 12.0, 15.0),
    )
    assert picture.marks == (Mark(7.0, "undone"), Mark(8.0, "rank 1 died"), Mark(11.0, "new controller"))
    assert picture.loads == {0: ((1.0, 5), (9.0, 7)), 1: ((1.0, 4), (9.0, 0))}


def test_a_pause_ends_by_a_resume_by_the_rank_s_death_or_with_the_picture() -> None:
    assert set(picture_of(LIFE).stretches) == {
        Stretch(0, "paused", 4.0, 10.0),
        Stretch(1, "paused", 5.0, 8.0),
        Stretch(1, "asleep", 5.0, 8.0),
        Stretch(0, "asleep", 13.0, 15.0),
    }


@pytest.mark.parametrize("count", [0, 1, 4, len(LIFE)])
def test_however_much_there_is_it_can_be_drawn(count: int, tmp_path: Path) -> None:
    write_png(picture_of(LIFE[:count]), tmp_path / "life.png")
    assert (tmp_path / "life.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        write_png(picture_of(LIFE), tmp_path / "life.png")
