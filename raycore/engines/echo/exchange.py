"""The collective in each step of an echo engine in lockstep: no tokens to exchange, so it proves that all ranks are in the same step."""

from __future__ import annotations

from typing import final

import numpy as np

from raycore.groups import ProcessGroup


class OutOfStepError(RuntimeError):
    """Ranks met in one collective at different steps: the waves are wrong."""


@final
class StepExchange:
    """Counts the steps of one group."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self._step = 0

    def meet(self) -> None:
        """Meet the other ranks in this step. LockstepError when one is gone, OutOfStepError when one is elsewhere."""
        if self._group is None:
            return
        # a buffer of its own: one whose collective failed may still be written to
        values = np.array([self._step], np.int64)
        self._group.sum(values)
        if values[0] != self._step * self._group.size:
            msg = f"step {self._step} here, {values[0] / self._group.size:g} on average"
            raise OutOfStepError(msg)
        self._step += 1
