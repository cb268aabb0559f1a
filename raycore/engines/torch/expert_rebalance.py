"""Moving to another placement of the same ranks in the background: layer by layer, a portion of bounded bytes before each step.

All ranks begin with the same step: each tells in every step which change it knows of (`ExpertExchange.word`), and once a step has shown
that all know of this one, the next step begins it everywhere. From there on it is the same sequence on every rank, so that each layer's
switch falls between the same two steps.
"""

from __future__ import annotations

import logging
from typing import final

from raycore.engines.torch.expert_exchange import ExpertExchange
from raycore.engines.torch.expert_map import ExpertMap, LayerMap, fingerprint
from raycore.engines.torch.expert_moves import SwapPlan
from raycore.engines.torch.expert_swap import ExpertSwap

_log = logging.getLogger(__name__)

_PATIENCE_STEPS = 1000
"""Steps in which not all ranks know of a change before those that do give it up: somebody was not asked, or refused."""


@final
class Rebalance:
    """One such change on one rank."""

    def __init__(self, exchange: ExpertExchange, placed: ExpertMap, budget_bytes: int) -> None:
        self.number = max(1, fingerprint(placed))
        self.received_bytes = 0
        self._exchange = exchange
        self._budget_bytes = budget_bytes
        now = exchange.placed
        self._layers: list[tuple[int, LayerMap]] = [(layer, placed[layer]) for layer in sorted(placed) if placed[layer] != now[layer]]
        self._has_begun = False
        self._patience = _PATIENCE_STEPS
        self._swap: ExpertSwap | None = None
        exchange.word = self.number

    @property
    def is_over(self) -> bool:
        """Whether every layer has its new placement, on this rank and, since they go together, on all; or nothing will come of it."""
        return not self._patience or (self._has_begun and not self._layers)

    def on_step(self) -> bool:
        """Before a step: go on by a portion, perhaps to a switch; whether tensors were replaced. LockstepError when a rank is lost."""
        exchange = self._exchange
        if not self._has_begun:
            self._has_begun = all(word == self.number for word in exchange.words)
            if not self._has_begun:
                self._give_up_at_last()
            return False
        if not self._layers:
            return False
        layer, after = self._layers[0]
        swap = self._swap
        if swap is None:
            plan = SwapPlan({layer: exchange.placed[layer]}, {layer: after}, tuple(range(exchange.size)))
            swap = self._swap = ExpertSwap(plan, exchange.group(), {layer: exchange.layers[layer].slots}, self._budget_bytes)
        received = swap.received_bytes
        is_complete = swap.advance()
        self.received_bytes += swap.received_bytes - received
        if not is_complete:
            return False
        swap.switch()
        swap.drop()
        exchange.adopt({layer: after}, rank=exchange.rank, size=exchange.size)
        self._swap = None
        self._layers.pop(0)
        return True

    def _give_up_at_last(self) -> None:
        """All ranks judge by the words of the same step, so that none gives up what another begins."""
        self._patience -= 1
        if not self._patience:
            _log.warning("experts are not moved: not all ranks know of change %d", self.number)

    def close(self) -> None:
        """Free what has come for a layer that is not switched; the layers that are stay so. Idempotent."""
        if self._swap is not None:
            self._swap.drop()
            self._swap = None
        self._exchange.word = 0
