"""The scale picture of a pool's life, from its events: ranks over time, operations and their phases, deaths, requests by rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from raycore.events import Began, Died, Ended, EpochBegan, Event, Left, LoadSeen, PhaseBegan, RankState

_UNDONE = "undone"
_ENDS = frozenset({"done", _UNDONE})
_NEEDS = "drawing needs matplotlib: pip install matplotlib"


Timed = tuple[float, Event]
"""Seconds from the picture's beginning, and what happened."""


class Span(msgspec.Struct, frozen=True):
    """One phase of an operation. Times here and below: seconds from the picture's beginning."""

    operation: str
    phase: str
    begin_s: float
    end_s: float


class Mark(msgspec.Struct, frozen=True):
    """Something that happened at one moment."""

    at_s: float
    text: str


class Stretch(msgspec.Struct, frozen=True):
    """A rank was paused or asleep for a while."""

    rank: int
    what: str
    begin_s: float
    end_s: float


class ScalePicture(msgspec.Struct, frozen=True):
    """What is drawn. `sizes`: from when so many ranks served. `loads`: of each rank, from when it had so many requests, run or waiting."""

    pool: str
    began_at_s: float
    end_s: float
    sizes: tuple[tuple[float, int], ...]
    spans: tuple[Span, ...]
    marks: tuple[Mark, ...]
    stretches: tuple[Stretch, ...]
    loads: dict[int, tuple[tuple[float, int], ...]]


def picture_of(events: Sequence[Event]) -> ScalePicture:
    """The picture of one life; empty events make an empty picture. What had not ended goes on to the last event."""
    if not events:
        return ScalePicture("", 0.0, 0.0, (), (), (), (), {})
    zero_s = events[0].at_s
    timed = [(event.at_s - zero_s, event) for event in events]
    return ScalePicture(
        pool=events[0].pool,
        began_at_s=zero_s,
        end_s=timed[-1][0],
        sizes=tuple(
            (at_s, len(event.ranks) if isinstance(event, EpochBegan) else 0)
            for at_s, event in timed
            if isinstance(event, (EpochBegan, Ended))
        ),
        spans=_spans(timed),
        marks=tuple(Mark(at_s, text) for at_s, event in timed if (text := _mark(event))),
        stretches=_stretches(timed),
        loads=_loads(timed),
    )


def _spans(timed: Sequence[Timed]) -> tuple[Span, ...]:
    spans: list[Span] = []
    phases: dict[str, tuple[str, float]] = {}
    for at_s, event in timed:
        if isinstance(event, PhaseBegan):
            if event.operation in phases:
                spans.append(Span(event.operation, *phases.pop(event.operation), at_s))
            if event.phase not in _ENDS:
                phases[event.operation] = (event.phase, at_s)
    return (*spans, *(Span(operation, phase, begin_s, timed[-1][0]) for operation, (phase, begin_s) in phases.items()))


def _mark(event: Event) -> str:
    match event:
        case Died():
            return f"rank {event.rank} died"
        case PhaseBegan() if event.phase == _UNDONE:
            return "undone"
        case Began() if event.recovered:
            return "new controller"
        case _:
            return ""


def _stretches(timed: Sequence[Timed]) -> tuple[Stretch, ...]:
    stretches: list[Stretch] = []
    since: dict[tuple[int, str], float] = {}
    for at_s, event in timed:
        match event:
            case RankState():
                now = {"paused": event.is_paused, "asleep": event.is_sleeping}
            case Died() | Left():
                now = {"paused": False, "asleep": False}
            case _:
                continue
        for what, is_so in now.items():
            key = (event.rank, what)
            if is_so:
                since.setdefault(key, at_s)
            elif key in since:
                stretches.append(Stretch(*key, since.pop(key), at_s))
    return (*stretches, *(Stretch(rank, what, begin_s, timed[-1][0]) for (rank, what), begin_s in since.items()))


def _loads(timed: Sequence[Timed]) -> dict[int, tuple[tuple[float, int], ...]]:
    """A rank that is not told of any more has none."""
    loads: dict[int, list[tuple[float, int]]] = {}
    for at_s, event in timed:
        if isinstance(event, LoadSeen):
            for rank in {*loads, *event.ranks}:
                running, waiting, _ = event.ranks.get(rank, (0, 0, 0.0))
                loads.setdefault(rank, []).append((at_s, running + waiting))
    return {rank: tuple(points) for rank, points in sorted(loads.items())}


def write_png(picture: ScalePicture, path: Path) -> None:
    """Draw it. ImportError that says what to install without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 3))
    end_s = max(picture.end_s, 1e-3)
    above.set_title(f"pool {picture.pool}")
    _draw_sizes(above, picture, end_s)
    _draw_spans(middle, picture)
    _draw_loads(below, picture, end_s)
    for axes in (above, middle, below):
        for mark in picture.marks:
            axes.axvline(mark.at_s, color="tab:red", linewidth=0.8, linestyle="--")
    for stretch in picture.stretches:
        below.axvspan(stretch.begin_s, stretch.end_s, color="tab:gray", alpha=0.1, linewidth=0)
    below.set_xlim(0, end_s)
    below.set_xlabel("seconds")
    figure.savefig(path, dpi=110, format="png")


def _draw_sizes(axes: Any, picture: ScalePicture, end_s: float) -> None:
    sizes = picture.sizes or ((0.0, 0),)
    times, counts = zip(*sizes, strict=True)
    axes.step([*times, end_s], [*counts, counts[-1]], where="post", color="black")
    axes.set_ylim(0, max(counts) + 1)
    axes.set_ylabel("ranks")
    for mark in picture.marks:
        axes.annotate(mark.text, (mark.at_s, max(counts) + 0.6), fontsize="small", color="tab:red", ha="left", va="center")


def _draw_spans(axes: Any, picture: ScalePicture) -> None:
    names = list(dict.fromkeys(span.phase for span in picture.spans))
    for number, span in enumerate(picture.spans):
        row = names.index(span.phase)
        axes.barh(row, span.end_s - span.begin_s, left=span.begin_s, height=0.8, color=f"C{row}", alpha=0.8 if number % 2 else 1.0)
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.set_ylabel("operation")
    axes.invert_yaxis()


def _draw_loads(axes: Any, picture: ScalePicture, end_s: float) -> None:
    for rank, points in picture.loads.items():
        times, counts = zip(*points, strict=True)
        axes.step([*times, end_s], [*counts, counts[-1]], where="post", label=f"rank {rank}")
    axes.set_ylabel("requests")
    axes.set_ylim(bottom=0)
    if picture.loads:
        axes.legend(loc="upper right", fontsize="small", ncols=4)
