"""One policy under one set of circumstances, simulated with several seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.simulation.engine import SimRequest
from bench.simulation.fleet import FleetSimulation, Outcome, Setup
from bench.simulation.summary import Summary, summarise
from raycore.routing.selection import make_router
from raycore.traces import BLOCK_TOKENS, TraceRequest, load_trace

SHIFT_GAPS = 8
"""With seeds above 0 every arrival moves by up to so many mean gaps: bursts stay, and which request meets which changes."""


def draws(path: Path | None, rate_scale: float, seeds: int, requests: int | None = None) -> list[list[TraceRequest]]:
    """One trace as recorded (or drawn from seed 0), and variants of it for the seeds 1, 2, ...: simulations that differ by chance only."""
    traces = [load_trace(path, rate_scale=rate_scale, seed=seed, requests=requests) for seed in range(seeds)]
    return [shifted(trace, seed) if seed else trace for seed, trace in enumerate(traces)]


def shifted(trace: Sequence[TraceRequest], seed: int) -> list[TraceRequest]:
    """The same requests, each a little earlier or later, in order of arrival."""
    chance = random.Random(seed)
    reach_s = SHIFT_GAPS * (trace[-1].arrival_s - trace[0].arrival_s) / len(trace)
    moved = (row._replace(arrival_s=max(0.0, row.arrival_s + chance.uniform(-reach_s, reach_s))) for row in trace)
    return sorted(moved, key=lambda row: row.arrival_s)


def simulate(policy: str, trace: Sequence[TraceRequest], setup: Setup) -> Outcome:
    """The trace through a fleet whose clients route by this policy, its options those that such a pool would be given."""
    requests = [SimRequest.of(index, row) for index, row in enumerate(trace)]
    options = policy_options(policy, setup)
    return FleetSimulation(requests, setup, lambda chance, clock: make_router(policy, options, randomness=chance, clock=clock)).run()


def policy_options(policy: str, setup: Setup) -> dict[str, int]:
    """What a policy has to be told: the reference counts its clients, and how much a prefix cache keeps only its owner knows."""
    if policy in ("reference", "reference-floor"):
        return {"clients": setup.routers}
    if policy == "prefix" and setup.model.cache_blocks:
        return {"block_tokens": BLOCK_TOKENS, "cache_tokens": setup.model.cache_blocks * BLOCK_TOKENS}
    return {}


def study(policy: str, traces: Sequence[Sequence[TraceRequest]], setup: Setup) -> list[Summary]:
    """One simulation for each of the `draws`; clients draw from the same seed."""
    return [summarise(simulate(policy, trace, replace(setup, seed=seed))) for seed, trace in enumerate(traces)]
