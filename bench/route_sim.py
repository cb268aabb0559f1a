"""Routing policies in simulation: the router that clients use, fed by simulated engines and a trace; no Ray, the same from a seed.

python -m bench.route_sim [--trace FILE] [--policies work reference] [--engines 8] [--rate-scale 18.5] [--requests N] [--seeds 3]
    [--routers 4] [--report-s 1.0] [--slowness 2 2] [--no-pace] [--lockstep] [--cache-blocks 2000] [--max-batch-tokens 8192]
    [--rates 16 17 18] [--json FILE] [--plots DIRECTORY]

FILE is Azure's CSV or Mooncake's JSONL; without one a synthetic trace is drawn from each seed. A recorded trace is
taken as it is with the first seed, and with slightly shifted arrivals with the others. Of several seeds the median is printed, and
behind it how far they are apart. `--rates` repeats all at several rates; `bench.route_aims` measures what the project aims at.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.report import machine
from bench.simulation.engine import StepModel
from bench.simulation.fleet import Setup
from bench.simulation.study import draws, simulate, study
from bench.simulation.summary import over_seeds
from raycore.errors import ConfigurationError
from raycore.routing.selection import NAMES

DEFAULT_RATE_SCALE = 18.5
"""Eight engines of the default model are near saturation at this multiple of the Azure conversation trace's rate."""
_TIMES = ("ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "between_p50_s", "between_p99_s")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--trace", type=Path, help="Azure CSV or Mooncake JSONL; none: synthetic")
    given.add_argument("--policies", nargs="+", default=list(NAMES), choices=NAMES, metavar="POLICY", help=", ".join(NAMES))
    given.add_argument("--engines", type=int, default=8)
    given.add_argument("--rate-scale", type=float, default=DEFAULT_RATE_SCALE, help="how much faster than recorded requests arrive")
    given.add_argument("--rates", type=float, nargs="+", help="several rate scales, one after the other")
    given.add_argument("--requests", type=int, help="the first so many of the trace")
    given.add_argument("--seeds", type=int, default=3, help="simulations of each policy")
    given.add_argument("--routers", type=int, default=1, help="clients that route to the same engines")
    given.add_argument(
        "--report-s", type=float, default=0.0, help="least time between two reports of an engine to a client; 0: every frame"
    )
    given.add_argument("--slowness", type=float, nargs="+", default=[], help="what the first engines' step times are multiplied by")
    given.add_argument("--no-pace", action="store_true", help="engines do not report how fast they are")
    given.add_argument("--lockstep", action="store_true", help="all engines step together")
    given.add_argument("--cache-blocks", type=int, default=0, help="blocks of 512 tokens that an engine's prefix cache keeps; 0: none")
    given.add_argument("--max-batch-tokens", type=int, default=StepModel.max_batch_tokens)
    given.add_argument("--json", type=Path)
    given.add_argument("--plots", type=Path, help="a directory for waits.png, balance.png and, with --rates, rates.png")
    return given


def setup_of(options: argparse.Namespace) -> Setup:
    """What the command line describes; ConfigurationError for what cannot be."""
    for name in ("engines", "routers", "seeds"):
        if getattr(options, name) < 1:
            msg = f"--{name} must be at least 1, not {getattr(options, name)}"
            raise ConfigurationError(msg)
    if len(options.slowness) > options.engines or any(factor <= 0 for factor in options.slowness):
        msg = f"--slowness is a factor above 0 for each of at most {options.engines} engines, not {options.slowness}"
        raise ConfigurationError(msg)
    return Setup(
        engines=options.engines,
        model=StepModel(max_batch_tokens=options.max_batch_tokens, cache_blocks=options.cache_blocks),
        routers=options.routers,
        report_s=options.report_s,
        slowness=tuple(options.slowness),
        is_lockstep=options.lockstep,
        reports_pace=not options.no_pace,
    )


def heading(seeds: int) -> str:
    """Over the columns of `line`."""
    spread = " p99 of the seeds" if seeds > 1 else ""
    times = f"{'first token p50, p90, p99':^26} {'between p50, p99':^17}"
    return f"{'policy':16} {times} {'imbalance':>9} {'hits':>6} {'preempted':>9}{spread}"


def line(policy: str, row: dict[str, dict[str, float]], seeds: int) -> str:
    """One policy's medians, times in milliseconds, and what its seeds gave at p99 of the first token."""
    first, second, third, *between = (f"{row[name]['median'] * 1e3:8.1f}" for name in _TIMES)
    p99 = row["ttft_p99_s"]
    spread = f" {p99['min'] * 1e3:8.1f} .. {p99['max'] * 1e3:.1f}" if seeds > 1 else ""
    return (
        f"{policy:16} {first} {second} {third} {' '.join(between)} {row['imbalance']['median']:9.2f} "
        f"{row['prefix_hits']['median']:6.3f} {row['preempted']['median']:9.0f}{spread}"
    )


def main() -> None:
    """Simulate, print, draw."""
    options = parser().parse_args()
    try:
        setup = setup_of(options)
        rates = options.rates or [options.rate_scale]
        results = [_at_rate(rate, setup, options) for rate in rates]
    except ConfigurationError as error:
        sys.exit(f"bench.route_sim: {error}")
    if options.plots is not None:
        _draw(options, setup, dict(zip(rates, results, strict=True)))
    if options.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        payload = {"machine": machine(), "settings": settings, "setup": asdict(setup), "rates": rates, "results": results}
        options.json.write_text(json.dumps(payload, indent=1), encoding="utf-8")


def _at_rate(rate: float, setup: Setup, options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    out = sys.stdout
    traces = draws(options.trace, rate, options.seeds, options.requests)
    source = "synthetic" if options.trace is None else options.trace.name
    out.write(
        f"\n{setup.engines} engines, {setup.routers} clients, {len(traces[0])} requests ({source}) at {rate:g} x their rate; milliseconds\n"
    )
    out.write(heading(options.seeds) + "\n")
    rows: dict[str, Any] = {}
    for policy in options.policies:
        rows[policy] = over_seeds(study(policy, traces, setup))
        out.write(line(policy, rows[policy], options.seeds) + "\n")
        out.flush()
    return rows


def _draw(options: argparse.Namespace, setup: Setup, by_rate: dict[float, Any]) -> None:
    from bench.simulation.plots import plot_balance, plot_curves, plot_waits

    options.plots.mkdir(parents=True, exist_ok=True)
    rate = max(by_rate)
    (trace,) = draws(options.trace, rate, 1, options.requests)
    outcomes = {policy: simulate(policy, trace, setup) for policy in options.policies}
    source = "synthetic" if options.trace is None else options.trace.stem
    title = f"{source}, {setup.engines} engines, {setup.routers} client{'s' if setup.routers > 1 else ''}"
    plot_waits(outcomes, f"{title}, {rate:g} x the rate", options.plots / "waits.png")
    plot_balance(outcomes, f"{title}, {rate:g} x the rate", options.plots / "balance.png")
    if len(by_rate) > 1:
        curves = {
            policy: [(each, rows[policy]["ttft_p99_s"]["median"] * 1e3) for each, rows in sorted(by_rate.items())]
            for policy in options.policies
        }
        plot_curves(curves, (title, "times the trace's rate", "p99 of the time to first token, ms"), options.plots / "rates.png")


if __name__ == "__main__":
    main()
