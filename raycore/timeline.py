"""What a pool did over time: tokens by rank, who served, and what was going on; as a line of blocks or a PNG."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BLOCKS = " ▁▂▃▄▅▆▇█"
_SMALLEST_S = 1e-9
_MOST_BINS = 60


class Timeline:
    """Times are seconds from its beginning."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self._members: list[tuple[float, int]] = []
        self._spans: list[tuple[float, float, str]] = []

    def add_tokens(self, at_s: float, rank: int, tokens: int) -> None:
        """A rank delivered so many tokens."""
        self._tokens[rank].append((at_s, tokens))

    def set_members(self, at_s: float, count: int) -> None:
        """So many ranks serve from now on."""
        self._members.append((at_s, count))

    def add_span(self, begin_s: float, end_s: float, name: str) -> None:
        """Something went on for a while."""
        self._spans.append((begin_s, end_s, name))

    def rates(self, bin_s: float) -> tuple[NDArray[np.floating], dict[int, NDArray[np.float64]]]:
        """Begins of bins [n], and tokens a second in each bin by rank [n]; bins begin at 0 and hold everything that was added."""
        times = [at for points in self._tokens.values() for at, _ in points]
        count = int(max(times, default=0.0) / bin_s) + 1
        rates: dict[int, NDArray[np.float64]] = {}
        for rank in sorted(self._tokens):
            sums = np.zeros(count)
            for at, tokens in self._tokens[rank]:
                sums[int(at / bin_s)] += tokens
            rates[rank] = sums / bin_s
        return np.arange(count, dtype=np.float64) * bin_s, rates

    def blocks(self, width: int) -> str:
        """The rate of all ranks together, as `width` blocks of eight heights."""
        end_s = max((at for points in self._tokens.values() for at, _ in points), default=0.0)
        _, rates = self.rates(max(end_s / width, _SMALLEST_S) * (1 + _SMALLEST_S))
        total = np.sum(list(rates.values()), axis=0) if rates else np.zeros(1)
        heights = np.ceil(total / max(total.max(), _SMALLEST_S) * (len(_BLOCKS) - 1)).astype(int)
        return "".join(_BLOCKS[height] for height in heights[:width])

    def write_png(self, path: Path, title: str, bin_s: float = 0.5) -> None:
        """Tokens a second stacked by rank, the number of ranks above it, spans shaded. ImportError without matplotlib.

        `bin_s`: at least; where a step takes longer than a bin, the rate would be stripes.
        """
        from matplotlib.figure import Figure

        last_s = max((at for points in self._tokens.values() for at, _ in points), default=0.0)
        bin_s = max(bin_s, last_s / _MOST_BINS)
        begins, rates = self.rates(bin_s)
        end_s = float(begins[-1]) + bin_s
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
        times, counts = zip(*self._members, strict=True) if self._members else ((0.0,), (len(rates),))
        above.step([*times, end_s], [*counts, counts[-1]], where="post", color="black")
        above.set_ylim(0, max(counts) + 1)
        above.set_ylabel("ranks")
        above.set_title(title)
        below.set_xlabel("seconds")
        below.set_ylabel("tokens/s")
        if rates:
            below.stackplot(begins, *rates.values(), labels=[f"rank {rank}" for rank in rates], step="post")
            below.legend(loc="upper right")
        for number, (begin_s, until_s, name) in enumerate(self._spans):
            for axes in (above, below):
                axes.axvspan(begin_s, until_s, alpha=0.12 + 0.1 * (number % 2), color="tab:gray", linewidth=0)
            above.annotate(name, ((begin_s + until_s) / 2, 0.3), ha="center", fontsize="small", rotation=0)
        figure.savefig(path, dpi=110)
