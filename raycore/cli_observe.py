"""`raycore events`, `timeline`, `dashboard`: what a pool did, as lines and as a picture, and Grafana's view of its metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from raycore.cli_output import AsJson, examples, print_json
from raycore.console import error_console
from raycore.errors import ConfigurationError
from raycore.event_log import find_log, last_life, read_log
from raycore.events import Event, LoadSeen, decode_lines, encode, line_for_people

PoolOrFile = Annotated[
    str | None, typer.Argument(metavar="[POOL|FILE]", help="A pool, running or gone, or an event log; the newest log by default.")
]

_EXAMPLES = {
    "events": examples("raycore events chat --follow", "raycore events chat --all --json"),
    "timeline": examples("raycore timeline chat -o picture.png", "raycore timeline chat --json"),
    "dashboard": examples("raycore dashboard", "raycore dashboard --json"),
}

_POLL_S = 0.25


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in (("events", events), ("timeline", timeline), ("dashboard", dashboard)):
        app.command(name, epilog=_EXAMPLES[name])(command)


def events(
    name: PoolOrFile = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, one object a line.")] = False,
    is_all: Annotated[bool, typer.Option("--all", help="Of earlier pools of the name too.")] = False,
    shows_loads: Annotated[bool, typer.Option("--loads", help="Loads too, which come once a second while they change.")] = False,
    follows: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is new, until Ctrl-C.")] = False,
) -> None:
    """Print what happened to a pool: members, deaths and their causes, phases of scaling, pauses. Works when the pool is gone."""
    path = find_log(name)

    def show(event: Event) -> None:
        if shows_loads or not isinstance(event, LoadSeen):
            typer.echo(encode(event).decode().rstrip() if as_json else line_for_people(event))

    end = path.stat().st_size  # before it is read: what is written meanwhile is shown by the following, twice at worst
    found = read_log(path)
    for event in found if is_all else last_life(found):
        show(event)
    if follows:
        for event in _follow(path, end):
            show(event)


def _follow(path: Path, at: int) -> Iterator[Event]:
    while True:
        time.sleep(_POLL_S)
        size = path.stat().st_size if path.exists() else 0
        if size < at:  # it was put aside, and begins anew
            at = 0
        if size > at:
            with path.open("rb") as file:
                file.seek(at)
                whole = file.read(size - at)
            whole = whole[: whole.rfind(b"\n") + 1]
            at += len(whole)
            yield from decode_lines(whole.splitlines())


def timeline(
    name: PoolOrFile = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="PNG", help="By default POOL-timeline.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a pool's life from its event log: ranks, phases of scaling, deaths, requests by rank. Works when the pool is gone."""
    from raycore.scale_picture import picture_of, write_png

    found = last_life(read_log(find_log(name)))
    if not found:
        raise ConfigurationError("the event log is empty")
    picture = picture_of(found)
    path = output or Path(f"{picture.pool}-timeline.png")
    try:
        write_png(picture, path)
    except (ImportError, OSError) as error:
        raise ConfigurationError(f"no picture: {error}") from error
    operations = len({span.operation for span in picture.spans})
    if as_json:
        print_json({"path": str(path), "seconds": picture.end_s, "operations": operations, "marks": len(picture.marks)})
        return
    line = f"{path}: {picture.end_s:.1f} s, {operations} scaling operations, {len(picture.marks)} marks"
    error_console().print(line, markup=False, highlight=False)


def dashboard(as_json: Annotated[bool, typer.Option("--json", help="On one line.")] = False) -> None:
    """Print the Grafana dashboard of all pools as JSON, to be imported there."""
    text = resources.files("raycore").joinpath("dashboards/raycore.json").read_text(encoding="utf-8")
    if as_json:
        print_json(json.loads(text))
        return
    typer.echo(text.rstrip())
