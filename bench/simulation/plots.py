"""Pictures of simulations, small PNGs for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from bench.simulation.fleet import Outcome
from bench.simulation.summary import WINDOW_S, tokens_by_window

mpl.use("Agg")  # no display
from matplotlib import pyplot as plt

_SIZE_INCHES = (6.4, 3.6)
_DOTS_PER_INCH = 100
_POINTS = 1000
"""A curve needs no more than this at that size."""
_TAIL_SHARE = 99.9
"""Curves end here: what is beyond is a handful of requests."""


def plot_waits(outcomes: Mapping[str, Outcome], title: str, path: Path) -> None:
    """Share of requests whose first token took longer than so long, by policy; both axes logarithmic, so that the tail is seen."""
    figure, axes = plt.subplots(figsize=_SIZE_INCHES, layout="constrained")
    for name, outcome in outcomes.items():
        waits_ms = 1e3 * np.array([request.first_token_s - request.arrival_s for request in outcome.requests])
        shares = np.linspace(0, _TAIL_SHARE, _POINTS)
        axes.plot(np.percentile(waits_ms, shares), 100 - shares, label=name, linewidth=1.3)
    axes.set(xscale="log", yscale="log", title=title, xlabel="time to first token, ms", ylabel="requests that took longer, %")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_balance(outcomes: Mapping[str, Outcome], title: str, path: Path) -> None:
    """The busiest engine's tokens over the mean, window by window."""
    figure, axes = plt.subplots(figsize=_SIZE_INCHES, layout="constrained")
    for name, outcome in outcomes.items():
        windows = tokens_by_window(outcome, WINDOW_S)
        means = windows.mean(axis=1)
        worst = np.divide(windows.max(axis=1), means, out=np.ones_like(means), where=means > 0)
        axes.plot(WINDOW_S * np.arange(len(worst)), worst, label=name, linewidth=1.0)
    axes.set(title=title, xlabel="s", ylabel=f"busiest engine / mean, windows of {WINDOW_S:g} s")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_curves(curves: Mapping[str, Sequence[tuple[float, float]]], labels: tuple[str, str, str], path: Path) -> None:
    """(x, y) of each name; `labels`: title, x, y. The y axis is logarithmic, where the curves span more than a decade."""
    figure, axes = plt.subplots(figsize=_SIZE_INCHES, layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3, linewidth=1.3)
    heights = [y for points in curves.values() for _, y in points]
    title, x, y = labels
    axes.set(title=title, xlabel=x, ylabel=y, yscale="log" if max(heights) > 10 * min(heights) else "linear")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
    plt.close(figure)
