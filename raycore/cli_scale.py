"""`raycore scale`, `remove-ranks`, `autoscale`, `cancel-scaling`: how many ranks a running pool has."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Annotated, Any

import msgspec
import typer
from rich.filesize import decimal

from raycore.cli_output import AsJson, examples, print_json
from raycore.console import error_console, working
from raycore.errors import ConfigurationError

_EXAMPLES = {
    "scale": examples("raycore scale chat 4", "raycore scale chat 1 --json"),
    "remove-ranks": examples("raycore remove-ranks chat 0", "raycore remove-ranks chat 2 3"),
    "autoscale": examples(
        "raycore autoscale chat --max 4 --options '{\"requests_per_rank\": 32}'",
        "raycore autoscale chat --max 4 --apply",
        "raycore autoscale chat --off",
    ),
    "cancel-scaling": examples("raycore cancel-scaling chat"),
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in (("scale", scale), ("remove-ranks", remove_ranks), ("autoscale", autoscale), ("cancel-scaling", cancel_scaling)):
        app.command(name, epilog=_EXAMPLES[name])(command)


def scale(
    pool: str,
    data_parallel_size: Annotated[int, typer.Argument(min=1, help="Ranks that shall serve.")],
    as_json: AsJson = False,
) -> None:
    """Grow or shrink a running POOL while it serves; what runs on a rank that leaves goes on elsewhere."""
    from raycore import api

    with _goes_on(pool), working(f"pool {pool!r} goes to {data_parallel_size} ranks"):
        report = api.scale_elastic_ep(pool, data_parallel_size)
    _print_scaling(report, as_json=as_json)


def remove_ranks(
    pool: str,
    ranks: Annotated[list[int], typer.Argument(help="Who leaves; any rank may.")],
    as_json: AsJson = False,
) -> None:
    """Let chosen RANKS of a running POOL leave."""
    from raycore import api

    with _goes_on(pool), working(f"ranks {', '.join(map(str, ranks))} leave pool {pool!r}"):
        report = api.remove_ranks(pool, ranks)
    _print_scaling(report, as_json=as_json)


def autoscale(
    pool: str,
    *,
    policy: Annotated[str, typer.Option(help="target-work, schedule, highest, or module:Class.")] = "target-work",
    options: Annotated[str, typer.Option(help="The policy's options, as JSON.")] = "{}",
    min_ranks: Annotated[int, typer.Option("--min", min=1, help="Never fewer ranks.")] = 1,
    max_ranks: Annotated[int, typer.Option("--max", min=1, help="Never more.")] = 8,
    interval_s: Annotated[float, typer.Option("--interval", help="Seconds between two looks.")] = 1.0,
    is_applied: Annotated[
        bool, typer.Option("--apply/--dry-run", help="Scale, or only show in `raycore status` what would be done.")
    ] = False,
    is_off: Annotated[bool, typer.Option("--off", help="Scale by hand again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have a running POOL scale itself by a policy; a dry run unless told otherwise."""
    from raycore import api

    settings = None if is_off else _settings(policy, options, (min_ranks, max_ranks), interval_s, is_applied=is_applied)
    with working(f"looking for pool {pool!r}"):
        api.autoscale(pool, settings)
    if as_json:
        print_json({"pool": pool, "autoscaling": settings})
    elif is_off:
        typer.echo(f"pool {pool!r} is scaled by hand")
    else:
        how = "scales itself" if is_applied else "says what it would do (a dry run)"
        typer.echo(f"pool {pool!r} {how}: `raycore status {pool}` shows it")


def _settings(policy: str, options: str, ranks: tuple[int, int], interval_s: float, *, is_applied: bool) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(options, type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"--options is a JSON object: {error}") from error
    bounds = dict(zip(("min_ranks", "max_ranks"), ranks, strict=True))
    return {"policy": policy, "options": given, "bounds": bounds, "interval_s": interval_s, "dry_run": not is_applied}


def cancel_scaling(pool: str, as_json: AsJson = False) -> None:
    """Undo the scaling operation that runs on POOL, where it is not decided yet."""
    from raycore import api

    with working(f"looking for pool {pool!r}"):
        operation = api.cancel_scaling(pool)
    if as_json:
        print_json({"pool": pool, "operation": operation})
    else:
        typer.echo(f"operation {operation} of pool {pool!r} is being undone")


@contextlib.contextmanager
def _goes_on(pool: str) -> Generator[None]:
    """An interrupt ends the command, not the pool's operation: say so."""
    try:
        yield
    except KeyboardInterrupt:
        line = f"the operation goes on: `raycore status {pool}` shows it, `raycore cancel-scaling {pool}` undoes it"
        error_console().print(line, markup=False, highlight=False, soft_wrap=True)
        raise


def _print_scaling(report: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    took_s = sum(report.phases_s.values())
    changes = [f"{what} {', '.join(map(str, ranks))}" for what, ranks in (("joined:", report.joined), ("left:", report.left)) if ranks]
    if report.weight_bytes or report.weight_bytes_from_disk:
        came, read = decimal(report.weight_bytes), decimal(report.weight_bytes_from_disk)
        changes.append(f"weights: {came} from peers, {read} from disk")
    typer.echo(f"ranks {', '.join(map(str, report.ranks))} serve ({'; '.join(changes) or 'nothing to do'}; {took_s:.1f} s)")
