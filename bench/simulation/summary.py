"""What a simulation comes to: times to the first token and between tokens, how even the engines' work was, what prefixes saved."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bench.simulation.fleet import Outcome

SHARES = (50, 90, 99)
WINDOW_S = 10.0
"""Imbalance is told of windows of this length: over a whole trace anything that is fair in the long run looks balanced."""


@dataclass(frozen=True)
class Summary:
    """One simulation in numbers; times in seconds."""

    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    between_p50_s: float
    between_p90_s: float
    between_p99_s: float
    imbalance: float
    """Tokens computed by the busiest engine over the mean, in the median window of `WINDOW_S`."""
    imbalance_in_all: float
    """The same of the whole trace."""
    prefix_hits: float
    """Share of prompt tokens that came out of a cache."""
    preempted: int
    end_s: float


def summarise(outcome: Outcome) -> Summary:
    """The numbers of one simulation."""
    waits = np.percentile([request.first_token_s - request.arrival_s for request in outcome.requests], SHARES)
    between = _weighted_percentiles(
        np.array([length_s for _, _, length_s, _, _ in outcome.steps]), np.array([later for _, _, _, later, _ in outcome.steps])
    )
    windows = tokens_by_window(outcome, WINDOW_S)
    busy = windows[windows.sum(axis=1) > 0]
    in_all = windows.sum(axis=0)
    prompts = sum(request.prompt_tokens for request in outcome.requests)
    return Summary(
        *(float(value) for value in (*waits, *between)),
        imbalance=float(np.median(busy.max(axis=1) / busy.mean(axis=1))),
        imbalance_in_all=float(in_all.max() / in_all.mean()),
        prefix_hits=sum(request.hit_tokens for request in outcome.requests) / prompts,
        preempted=sum(engine.preempted for engine in outcome.engines),
        end_s=outcome.end_s,
    )


def tokens_by_window(outcome: Outcome, window_s: float) -> np.ndarray:
    """Tokens computed, float64 [windows, engines]; a step counts where it began, and the last window, which is cut short, is left out."""
    engines, begins, _, _, tokens = (np.array(column) for column in zip(*outcome.steps, strict=True))
    windows = (begins // window_s).astype(np.int64)
    grid = np.zeros((int(windows.max()) + 1, len(outcome.engines)))
    np.add.at(grid, (windows, engines.astype(np.int64)), tokens)
    return grid[:-1] if len(grid) > 1 else grid


def over_seeds(runs: Sequence[Summary]) -> dict[str, dict[str, float]]:
    """Each number's median, least and greatest over simulations that differ in their seed only."""
    columns = {name: [asdict(run)[name] for run in runs] for name in asdict(runs[0])}
    return {name: {"median": statistics.median(values), "min": min(values), "max": max(values)} for name, values in columns.items()}


def _weighted_percentiles(lengths_s: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A step's length is the time between two tokens for each sequence that had one before it."""
    order = np.argsort(lengths_s)
    upto = np.cumsum(weights[order])
    if not upto[-1]:
        return np.zeros(len(SHARES))
    return lengths_s[order][np.searchsorted(upto, upto[-1] * np.array(SHARES) / 100)]
