"""`raycore bench`: measurements of running pools."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from raycore.cli_output import examples, print_json
from raycore.config import DEFAULT_ROUTER
from raycore.errors import ConfigurationError

bench_app = typer.Typer(help="Measure pools.", no_args_is_help=True)
LOST = 1


@bench_app.callback()
def bench() -> None:
    """Measure pools."""


_EXAMPLES = examples(
    "raycore bench serve --data-parallel-size 4 --rate-scale 5 --requests 1000",
    "raycore bench serve --pool chat --trace AzureLLMInferenceTrace_conv.csv --clients 4 --json report.json",
    "raycore bench serve --requests 100 --json -",
)


@bench_app.command(epilog=_EXAMPLES)
def serve(
    pool: Annotated[str | None, typer.Option(help="A pool that runs; without it one is launched.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Azure's CSV or Mooncake's JSONL; a synthetic trace from --seed by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the synthetic trace, and of what a trace leaves open.")] = 0,
    rate_scale: Annotated[float, typer.Option(help="Arrivals so many times as fast as recorded.")] = 1.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    duration: Annotated[float | None, typer.Option(help="Only those that arrive within so many seconds, after scaling.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Client processes, each a frontend with a router of its own.")] = 1,
    drain: Annotated[float, typer.Option(help="Seconds after the last arrival; what has not ended then is lost.")] = 120.0,
    engine: Annotated[str, typer.Option(help="Of the launched pool: echo, torch, or module:function.")] = "echo",
    model: Annotated[str | None, typer.Option(help="Of the launched pool.")] = None,
    data_parallel_size: Annotated[int, typer.Option(min=1, help="Of the launched pool.")] = 1,
    engine_options: Annotated[str, typer.Option(metavar="JSON", help="Of the launched pool, such as a step-time model.")] = "{}",
    device: Annotated[str, typer.Option(help="Of the launched pool: cpu or cuda.")] = "cpu",
    router: Annotated[str, typer.Option(help="Of the launched pool: a routing policy.")] = DEFAULT_ROUTER,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report there; - prints nothing else.")
    ] = None,
) -> None:
    """Replay a trace against a pool, open loop, and print what its clients saw. Exits with 1 when a request was lost."""
    from raycore.bench_serve import ServeBench, run_bench, show

    config: dict[str, Any] = {
        "pool": f"bench-{os.getpid()}",
        "engine": engine,
        "model": model,
        "data_parallel_size": data_parallel_size,
        "engine_options": parsed_options(engine_options),
        "device": device,
        "router": router,
    }
    report = asyncio.run(
        run_bench(
            ServeBench(
                trace=trace,
                seed=seed,
                rate_scale=rate_scale,
                requests=requests,
                duration_s=duration,
                clients=clients,
                drain_limit_s=drain,
                pool=pool,
                launch=config,
            )
        )
    )
    if json_file == Path("-"):
        print_json(report)
    else:
        show(report, Console())
    if json_file is not None and json_file != Path("-"):
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    if report.lost:
        raise typer.Exit(LOST)


def parsed_options(text: str) -> dict[str, Any]:
    """An engine's options as the command line has them. ConfigurationError unless they are a JSON object."""
    try:
        options: Any = json.loads(text)
    except ValueError as error:
        msg = f"--engine-options is not JSON: {error}"
        raise ConfigurationError(msg) from error
    if not isinstance(options, dict):
        msg = "--engine-options must be a JSON object"
        raise ConfigurationError(msg)
    return options
