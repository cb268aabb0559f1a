"""Routing policies live beside simulated: one trace, echo engines as Ray actors with the simulator's step-time model, the same parameters.

python -m bench.route_live [--trace FILE] [--policies reference work] [--engines 4] [--stretch 5] [--rate-scale 11] [--requests 1200]
    [--clients 1] [--json FILE]

Echo engines sleep through their steps, but each step costs a fraction of a millisecond of CPU at both ends. So that two cores carry a
fleet, time is stretched: every duration of the model and of the trace is `--stretch` times as long, live and simulated alike, and what is
printed is divided by it again. What is not stretched is the cost of the programs themselves, which is the point.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from bench.report import machine
from bench.simulation.engine import SimRequest, StepModel
from bench.simulation.fleet import FleetSimulation, Setup
from raycore.bench_serve import ServeBench, ServeReport, run_bench
from raycore.routing.selection import make_router
from raycore.traces import TraceRequest, load_trace, percentiles

SHARES = ("p50", "p90", "p99")
DRAIN_S = 300.0


def stretched(model: StepModel, stretch: float) -> StepModel:
    """The same engine in slow motion."""
    times = ("base_s", "per_sequence_s", "per_kv_token_s", "per_prefill_token_s")
    return replace(model, **{name: getattr(model, name) * stretch for name in times})


def engine_options(model: StepModel) -> dict[str, Any]:
    """The echo engine of a step-time model."""
    names = ("base_s", "per_sequence_s", "per_kv_token_s", "per_prefill_token_s", "max_batch_tokens", "max_sequences", "kv_tokens")
    return {**{name: getattr(model, name) for name in names}, "vocab_size": 32_000, "max_model_len": 1 << 17}


def simulated(policy: str, trace: list[TraceRequest], setup: Setup) -> dict[str, Any]:
    """What the simulator says."""
    requests = [SimRequest(n, r.arrival_s, r.prompt_tokens, r.output_tokens, r.blocks) for n, r in enumerate(trace)]
    outcome = FleetSimulation(requests, setup, lambda randomness, clock: make_router(policy, randomness=randomness, clock=clock)).run()
    work = [0] * setup.engines
    for request in outcome.requests:
        work[request.engine] += request.prompt_tokens + request.output_tokens
    later = [(r.end_s - r.first_token_s, r.output_tokens - 1) for r in outcome.requests]
    return {
        "ttft_s": percentiles([r.first_token_s - r.arrival_s for r in outcome.requests]),
        "per_token_s": percentiles([seconds / tokens for seconds, tokens in later if tokens]),
        "imbalance": max(work) * len(work) / sum(work),
    }


async def live(policy: str, bench: ServeBench, model: StepModel, engines: int) -> ServeReport:
    """What clients of a pool saw."""
    config: dict[str, Any] = {
        "pool": "route-live",
        "engine": "echo",
        "engine_options": engine_options(model),
        "data_parallel_size": engines,
        "num_cpus_per_engine": 0,
        "router": policy,
    }
    return await run_bench(ServeBench(**{**{name: getattr(bench, name) for name in bench.__struct_fields__}, "launch": config}))


def line(policy: str, what: str, row: dict[str, Any], stretch: float) -> str:
    """One row of the table, in the model's own milliseconds."""
    cells = [f"{row[name][share] / stretch * 1e3:9.1f}" for name in ("ttft_s", "per_token_s") for share in SHARES]
    return f"{policy:16} {what:10} {' '.join(cells)} {row['imbalance']:10.2f}"


def main() -> None:
    """Simulate and run each policy, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--policies", nargs="+", default=["round-robin", "reference", "work"])
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--stretch", type=float, default=5.0)
    parser.add_argument("--rate-scale", type=float, default=11.0, help="of the trace, before time is stretched")
    parser.add_argument("--requests", type=int, default=1200)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-simulate", action="store_true", help="to look for a load near saturation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scale = options.rate_scale / options.stretch
    trace = load_trace(options.trace, rate_scale=scale, seed=options.seed, requests=options.requests)
    model = stretched(StepModel(), options.stretch)
    setup = Setup(engines=options.engines, model=model, routers=options.clients, seed=options.seed)
    bench = ServeBench(
        trace=options.trace,
        seed=options.seed,
        rate_scale=scale,
        requests=options.requests,
        clients=options.clients,
        drain_limit_s=DRAIN_S,
    )
    facts = machine()
    out = sys.stdout
    out.write(f"{options.engines} engines, {len(trace)} requests, {options.rate_scale:g} x the trace's rate, {options.clients} clients, ")
    out.write(f"time stretched {options.stretch:g} x; milliseconds of the model's own time\n")
    out.write(f"{'policy':16} {'':10} {'first token p50, p90, p99':^29} {'a token p50, p90, p99':^29} {'imbalance':>10}\n")
    logging.disable(logging.WARNING)
    if not options.only_simulate:
        ray.init(address="local", num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    results: dict[str, Any] = {}
    for policy in options.policies:
        rows: dict[str, Any] = {"simulated": simulated(policy, trace, setup)}
        if not options.only_simulate:
            report = asyncio.run(live(policy, bench, model, options.engines))
            rows["live"] = {name: getattr(report, name) for name in ("ttft_s", "per_token_s", "imbalance", "lost", "kept_up", "late_s")}
            if report.lost or not report.kept_up:
                out.write(f"{policy}: lost {report.lost}, kept up: {report.kept_up}\n")
        for what, row in rows.items():
            out.write(line(policy, what, row, options.stretch) + "\n")
        out.flush()
        results[policy] = rows
    for what in ("simulated", "live"):
        if all(what in rows for rows in results.values()):
            order = sorted(results, key=lambda policy, what=what: results[policy][what]["ttft_s"]["p99"])
            out.write(f"{what}, by p99 of the first token: {' < '.join(order)}\n")
    if not options.only_simulate:
        ray.shutdown()
    if options.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"machine": facts, "settings": settings, "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
