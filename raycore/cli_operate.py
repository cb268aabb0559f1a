"""`raycore pause`, `resume`, `sleep`, `wake-up`: operations on every rank of a running pool."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import typer

from raycore.cli_output import AsJson, examples, print_json
from raycore.console import working

Timeout = Annotated[float | None, typer.Option("--timeout", min=0.001, help="Seconds; the operation's own limit by default.")]


class Mode(enum.StrEnum):
    """What happens to requests that run."""

    ABORT = "abort"
    WAIT = "wait"
    KEEP = "keep"


class Tag(enum.StrEnum):
    """What a sleeping engine can bring back."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


RunningMode = Annotated[Mode, typer.Option(help="Requests that run are aborted, waited for, or frozen until the pool goes on.")]


_EXAMPLES = {
    "pause": examples("raycore pause chat", "raycore pause chat --mode wait --timeout 60"),
    "resume": examples("raycore resume chat"),
    "sleep": examples("raycore sleep chat", "raycore sleep chat --level 2 --mode wait"),
    "wake-up": examples("raycore wake-up chat", "raycore wake-up chat --tag weights"),
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in (("pause", pause), ("resume", resume), ("sleep", sleep), ("wake-up", wake_up)):
        app.command(name, epilog=_EXAMPLES[name])(command)


def pause(pool: str, mode: RunningMode = Mode.ABORT, timeout_s: Timeout = None, as_json: AsJson = False) -> None:
    """Have every rank of POOL begin no more requests; done when all are idle. New requests wait for `raycore resume`."""
    _operate(pool, "pause_scheduler", timeout_s, "is paused", as_json=as_json, mode=mode.value)


def resume(pool: str, timeout_s: Timeout = None, as_json: AsJson = False) -> None:
    """Have a paused POOL go on. Harmless where it does."""
    _operate(pool, "resume_scheduler", timeout_s, "goes on", as_json=as_json)


def sleep(
    pool: str,
    level: Annotated[
        int, typer.Option(min=0, max=2, help="0: only pause; 1: weights to host memory, the KV cache dropped; 2: both dropped.")
    ] = 1,
    mode: RunningMode = Mode.ABORT,
    timeout_s: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Free the memory of every rank of POOL until `raycore wake-up`."""
    _operate(pool, "sleep", timeout_s, f"sleeps (level {level})", as_json=as_json, level=level, mode=mode.value)


def wake_up(
    pool: str,
    tags: Annotated[list[Tag] | None, typer.Option("--tag", help="Only this, more than once for both; everything by default.")] = None,
    timeout_s: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Bring back what a sleeping POOL let go of, and go on."""
    wanted = [tag.value for tag in tags] if tags else None
    _operate(
        pool, "wake_up", timeout_s, "is awake" if wanted is None else f"has its {' and '.join(wanted)} again", as_json=as_json, tags=wanted
    )


def _operate(pool: str, method: str, timeout_s: float | None, what: str, *, as_json: bool, **arguments: Any) -> None:
    from raycore import api

    with working(f"{method} on pool {pool!r}"), api.connect(pool) as client:
        result = getattr(client.operations, method)(timeout_s=timeout_s, **arguments)
        ranks = client.ranks()
    if as_json:
        print_json({"pool": pool, "operation": method, "ranks": ranks, "result": result})
    else:
        typer.echo(f"pool {pool!r} {what} (ranks {', '.join(map(str, ranks))})")
