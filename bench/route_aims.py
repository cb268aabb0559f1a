"""What routing aims at, measured in simulation on the two public traces: ratios of the same seed's simulations, their median and spread.

python -m bench.route_aims --azure FILE --mooncake FILE [--seeds 5] [--only azure] [--json FILE]

Eight engines near saturation: on the Azure conversation trace at the rate where the reference's rule has a p99 of the time to first
token of about 300 ms, on Mooncake's at the rate that round-robin can no longer serve.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from bench.report import Row, median, publish
from bench.route_sim import DEFAULT_RATE_SCALE
from bench.simulation.engine import StepModel
from bench.simulation.fleet import Setup
from bench.simulation.study import draws, study
from bench.simulation.summary import Summary
from raycore.traces import TraceRequest

MOONCAKE_RATE_SCALE = 4.0
CACHE_BLOCKS = 2000
"""Of 512 tokens: a million tokens an engine, as a cache in host memory would keep."""
LOCKSTEP_RATES = (8.0, 10.0, 12.0)
"""Up to where engines in lockstep are saturated, which is earlier: a step takes as long as the slowest engine's."""


PARTS = ("azure", "lockstep", "mooncake")


def p99(run: Summary) -> float:
    """Of the time to first token, seconds."""
    return run.ttft_p99_s


class Aims:
    """Runs each simulation once, however many ratios need it."""

    def __init__(self, azure: Path, mooncake: Path, seeds: int) -> None:
        self._seeds = seeds
        self._traces = cache(self._draw)
        self._runs = cache(self._study)
        self._azure = azure
        self._mooncake = mooncake

    def _draw(self, path: Path, rate: float) -> list[list[TraceRequest]]:
        return draws(path, rate, self._seeds)

    def _study(self, policy: str, path: Path, rate: float, setup: Setup) -> list[Summary]:
        return study(policy, self._traces(path, rate), setup)

    def ratio(
        self, name: str, over: Sequence[Summary], under: Sequence[Summary], aim: float, what: Callable[[Summary], float] = p99
    ) -> Row:
        """A row from two policies or circumstances, seed by seed."""
        samples = [what(one) / what(other) for one, other in zip(over, under, strict=True)]
        return Row(name, median(samples), "x", aim=f"<= {aim:g}", is_met=median(samples) <= aim, samples=samples)

    def rows(self, only: str | None = None) -> list[Row]:
        """All of them, or one part's."""
        parts = {"azure": self._on_azure, "lockstep": self._in_lockstep, "mooncake": self._on_mooncake}
        return [row for name in parts if only in (None, name) for row in parts[name]()]

    def _on_azure(self) -> list[Row]:
        def run(policy: str = "work", **circumstances: object) -> list[Summary]:
            return self._runs(policy, self._azure, DEFAULT_RATE_SCALE, replace(Setup(), **circumstances))

        reference, work = run("reference"), run()
        rows = [
            Row("p99 first token, reference", median([p99(each) * 1e3 for each in reference]), "ms", aim="about 300"),
            Row("p99 first token, round-robin", median([p99(each) * 1e3 for each in run("round-robin")]), "ms"),
            Row("p99 first token, work", median([p99(each) * 1e3 for each in work]), "ms"),
            self.ratio("work / reference", work, reference, 0.70),
            self.ratio("reports every 1 s / 100 ms", run(report_s=1.0), run(report_s=0.1), 1.0),
            self.ratio("4 routers / 1", run(routers=4), work, 1.55),
            self.ratio("16 routers / 1", run(routers=16), work, 1.85),
            self.ratio("two engines at half speed / none", run(slowness=(2.0, 2.0)), work, 1.8),
        ]
        seven = run(engines=7)
        unlearned = run(slowness=(2.0, 2.0), reports_pace=False)
        rows.append(Row("for comparison: seven full engines / eight", _ratio(seven, work), "x"))
        rows.append(Row("for comparison: half speed, not learned", _ratio(unlearned, work), "x"))
        return rows

    def _in_lockstep(self) -> list[Row]:
        rows: list[Row] = []
        for routers in (1, 4, 16):
            for rate in LOCKSTEP_RATES:
                setup = Setup(is_lockstep=True, routers=routers)
                work, turns = (self._runs(policy, self._azure, rate, setup) for policy in ("work", "round-robin"))
                rows.append(
                    Row(f"lockstep, {routers} routers, rate {rate:g}: p99, round-robin", median([p99(run) * 1e3 for run in turns]), "ms")
                )
                rows.append(self.ratio(f"lockstep, {routers} routers, rate {rate:g}: work / round-robin", work, turns, 1.0))
        return rows

    def _on_mooncake(self) -> list[Row]:
        setup = Setup(model=StepModel(cache_blocks=CACHE_BLOCKS))
        turns, *others = (
            self._runs(policy, self._mooncake, MOONCAKE_RATE_SCALE, setup) for policy in ("round-robin", "reference", "work", "prefix")
        )
        rows: list[Row] = []
        for policy, runs in zip(("reference", "work", "prefix"), others, strict=True):
            rows.append(self.ratio(f"Mooncake p50 first token: {policy} / round-robin", runs, turns, 0.15, lambda run: run.ttft_p50_s))
            samples = [run.imbalance for run in runs]
            rows.append(
                Row(f"Mooncake imbalance: {policy}", median(samples), "x", aim="<= 1.6", is_met=median(samples) <= 1.6, samples=samples)
            )
            samples = [run.prefix_hits for run in runs]
            rows.append(Row(f"Mooncake prefix hits: {policy}", median(samples), "of tokens", samples=samples))
        return rows


def _ratio(over: Sequence[Summary], under: Sequence[Summary]) -> float:
    return median([p99(one) / p99(other) for one, other in zip(over, under, strict=True)])


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--azure", type=Path, required=True)
    parser.add_argument("--mooncake", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = Aims(options.azure, options.mooncake, options.seeds).rows(options.only)
    publish(f"Routing in simulation, medians of {options.seeds} seeds", rows, options.json)
    for row in rows:
        if row.samples:
            print(f"{row.name:58} {min(row.samples):8.3f} .. {max(row.samples):.3f}")


if __name__ == "__main__":
    main()
