"""Autoscaling in simulation: what a pool's controller runs, on a load that rises and falls, beside fixed sizes and an oracle.

python -m bench.scale_sim [--trace FILE] [--minutes 40] [--peak 50] [--trough 10] [--engines 8] [--grow-s 20] [--requests-per-rank 40]
    [--json FILE] [--plot PNG]

The load goes from trough to peak and back in half of the time, with a burst of twice the rate for half a minute after three quarters of it.
The oracle knows how many requests there will be. `engine-seconds` counts engines that start, serve, or end what they have.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import machine
from bench.simulation.elastic import Ahead, ElasticFleet, ElasticSetup, Sizes, in_system, shaped
from bench.simulation.engine import SimRequest
from bench.simulation.fleet import FleetSimulation, Outcome, Setup
from elastic.policies import Bounds, ScalingPolicy, TargetWork
from raycore.routing.selection import make_router
from raycore.traces import TraceRequest, load_trace

STEADY_S = 600.0
BURST_S = 30.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--trace", type=Path, help="Azure CSV or Mooncake JSONL; none: synthetic")
    given.add_argument("--minutes", type=float, default=40.0)
    given.add_argument("--peak", type=float, default=50.0, help="requests a second")
    given.add_argument("--trough", type=float, default=10.0)
    given.add_argument("--engines", type=int, default=8, help="at most")
    given.add_argument("--grow-s", type=float, default=20.0, help="from a decision to a new engine's first request")
    given.add_argument("--requests-per-rank", type=float, default=40.0, help="the target of the policy")
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--json", type=Path)
    given.add_argument("--plot", type=Path, metavar="PNG")
    return given


def waves(options: argparse.Namespace) -> Callable[[float], float]:
    """Requests a second at each second."""
    seconds = options.minutes * 60

    def rate(at_s: float) -> float:
        share = 0.5 - 0.5 * math.cos(4 * math.pi * at_s / seconds)
        burst = 2.0 if 0 <= at_s - 0.75 * seconds < BURST_S else 1.0
        return burst * (options.trough + share * (options.peak - options.trough))

    return rate


def elastic_run(trace: list[TraceRequest], options: argparse.Namespace, policy: ScalingPolicy, bounds: Bounds) -> tuple[Outcome, Sizes]:
    """The trace through a fleet that scales itself."""
    fleet = ElasticFleet(
        [SimRequest.of(index, row) for index, row in enumerate(trace)],
        Setup(engines=options.engines, seed=options.seed),
        lambda chance, clock: make_router("work", {}, randomness=chance, clock=clock),
        ElasticSetup(policy, bounds, initial=bounds.min_ranks, grow_s=options.grow_s),
    )
    return fleet.run(), fleet.sizes


def fixed_run(trace: list[TraceRequest], options: argparse.Namespace, engines: int) -> tuple[Outcome, Sizes]:
    """The trace through a fleet that stays as it is."""
    requests = [SimRequest.of(index, row) for index, row in enumerate(trace)]
    make = lambda chance, clock: make_router("work", {}, randomness=chance, clock=clock)  # noqa: E731 -- a parameter of one call
    outcome = FleetSimulation(requests, Setup(engines=engines, seed=options.seed), make).run()
    return outcome, Sizes(sizes=[(0.0, engines), (outcome.end_s, engines)], engine_seconds=engines * outcome.end_s)


def row_of(name: str, outcome: Outcome, sizes: Sizes) -> dict[str, Any]:
    """One line of the table."""
    waits = np.percentile([request.first_token_s - request.arrival_s for request in outcome.requests], (50, 90, 99)) * 1e3
    return {
        "policy": name,
        "ttft_p50_ms": round(float(waits[0]), 1),
        "ttft_p90_ms": round(float(waits[1]), 1),
        "ttft_p99_ms": round(float(waits[2]), 1),
        "engine_seconds": round(sizes.engine_seconds),
        "most_engines": max(size for _, size in sizes.sizes),
        "resizes": len(sizes.resizes),
        "turns_in_10_min": sizes.turns_within(STEADY_S),
    }


def main() -> None:
    """Simulate, print, write."""
    options = parser().parse_args()
    recorded = load_trace(options.trace, seed=options.seed)
    seconds = options.minutes * 60
    trace = shaped(recorded, waves(options), seconds)
    print(f"{len(trace)} requests in {options.minutes:g} minutes, {options.trough:g} to {options.peak:g} a second", flush=True)
    bounds = Bounds(max_ranks=options.engines)
    policy = TargetWork(requests_per_rank=options.requests_per_rank)
    runs = {"fixed, all": fixed_run(trace, options, options.engines)}
    runs["target-work"] = elastic_run(trace, options, policy, bounds)
    known = in_system(runs["target-work"][0], seconds)
    mean = round(runs["target-work"][1].engine_seconds / seconds)
    runs[f"fixed, {mean}: as many engine-seconds"] = fixed_run(trace, options, mean)
    free = Bounds(max_ranks=options.engines, cool_down_s=0, cool_down_factor=0, growth=options.engines + 1)
    runs["oracle"] = elastic_run(trace, options, Ahead(known, options.requests_per_rank, options.grow_s), free)
    level = (options.peak + options.trough) / 2
    steady = shaped(recorded, lambda _at_s: level, 2 * STEADY_S)
    runs["target-work, steady load"] = elastic_run(steady, options, policy, bounds)
    rows = [row_of(name, *run) for name, run in runs.items()]
    print(f"{'':40} {'TTFT p50':>9} {'p90':>8} {'p99 ms':>8} {'engine-s':>9} {'most':>5} {'resizes':>8} {'turns in 10 min':>16}")
    for row in rows:
        waits = " ".join(f"{row[name]:8.1f}" for name in ("ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms"))
        print(
            f"{row['policy']:40}  {waits} {row['engine_seconds']:9} {row['most_engines']:5} {row['resizes']:8} {row['turns_in_10_min']:16}"
        )
    if options.json:
        given = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"machine": machine(), "options": given, "rows": rows}, indent=1) + "\n")
    if options.plot:
        _plot(runs, known, options)


def _plot(runs: dict[str, tuple[Outcome, Sizes]], known: list[float], options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(len(known)) / 60, np.array(known) / options.requests_per_rank, color="0.8", label="work, in engines", linewidth=0.8)
    for name in ("target-work", "oracle"):
        times, sizes = zip(*runs[name][1].sizes, strict=True)
        axes.step(np.array(times) / 60, sizes, where="post", label=name, linewidth=1.4)
    axes.set(xlabel="minutes", ylabel="engines")
    axes.set_ylim(0, options.engines + 1)
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(options.plot, dpi=100)


if __name__ == "__main__":
    main()
