"""Units of work: what a step computes, in the time that one token of prefill takes; and the pace at which an engine gets through them."""

from __future__ import annotations

from typing import final

STEP_UNITS = 240.0
"""A step reads all weights once however little it computes.

On one accelerator that takes as long as the arithmetic for so many tokens: its operations per byte of memory traffic, 150 to 300 today.
"""
SEQUENCE_UNITS = 0.8
"""Each sequence of a batch: a token's arithmetic, sampling, bookkeeping."""
KV_TOKEN_UNITS = 0.002
"""Each token of the cache is read once a step, at memory speed: some 100 KB a token against some 16 billion operations."""

_KEEP = 0.98
"""What an observed step leaves of those before it: the last fifty count."""
_WARM_UP_STEPS = 4
"""First steps compile, capture and allocate."""
_OUTLIER = 4.0
"""A later step that takes longer than so many times what was due was held up by something else."""


def step_units(sequences: int, kv_tokens: int, prefill_tokens: int) -> float:
    """What a step with this batch and this cache in use amounts to."""
    return STEP_UNITS + SEQUENCE_UNITS * sequences + KV_TOKEN_UNITS * kv_tokens + prefill_tokens


@final
class PaceMeter:
    """Learns how many nanoseconds one engine takes for a unit of work.

    For engines that step by themselves: in lockstep a step takes as long as the slowest engine's, whatever one's own work.
    """

    __slots__ = ("_seconds", "_steps", "_units")

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._units = 0.0

    def observe(self, seconds: float, units: float) -> None:
        """A step took so long and amounted to so much. One that is over in less than a millisecond is the host's own work: leave it out."""
        self._steps += 1
        if self._steps <= _WARM_UP_STEPS:
            return
        if self._units:
            seconds = min(seconds, _OUTLIER * units * self._seconds / self._units)
        self._seconds = self._seconds * _KEEP + seconds
        self._units = self._units * _KEEP + units

    @property
    def unit_ns(self) -> int:
        """Nanoseconds for a unit; 0 while nothing is known."""
        return round(self._seconds / self._units * 1e9) if self._units else 0
