"""What a client learns over all its engines: how long outputs are, and what pace is usual."""

from __future__ import annotations

from typing import final

HORIZON_STEPS = 8.0
"""Decode steps that count as work ahead of a new request: about as many as pass before it has its first token in a busy engine.

All remaining steps would make a long answer count as much as a long prompt, which holds up others at once and not bit by bit.
"""
_FIRST_GUESS_TOKENS = 128.0
_LENGTH_GAIN = 0.02
_PACE_GAIN = 0.05
_SAME_PACE = 0.1
"""Paces that differ by less are equal: that much is noise."""


@final
class LedgerBook:
    """One per client, shared by its ledgers."""

    __slots__ = ("_unit_ns", "expected_tokens", "horizon_steps")

    def __init__(self) -> None:
        self.expected_tokens = _FIRST_GUESS_TOKENS
        """What a request is expected to give: the mean of those that finished, the latest fifty counting most."""
        self.horizon_steps = HORIZON_STEPS
        self._unit_ns = 0.0

    def finished(self, tokens: int) -> None:
        """A request ended with so many tokens."""
        expected = self.expected_tokens
        expected += _LENGTH_GAIN * (tokens - expected)
        self.expected_tokens = expected
        self.horizon_steps = expected if expected < HORIZON_STEPS else HORIZON_STEPS

    def relative_pace(self, unit_ns: int) -> float:
        """An engine reported its pace: how much slower than usual that is."""
        if self._unit_ns:
            self._unit_ns += _PACE_GAIN * (unit_ns - self._unit_ns)
        else:
            self._unit_ns = unit_ns
        ratio = unit_ns / self._unit_ns
        return 1.0 if -_SAME_PACE < ratio - 1.0 < _SAME_PACE else ratio
