"""The experts of a forward pass, spread over the ranks of a process group; registered with transformers' experts interface.

In each layer a rank sends every (token, expert) row to the rank that holds the copy which serves it, computes what it received with
transformers' own grouped product, and sends the results back. The sender weights them and adds them up in the router's order, as
transformers does: a token's result is put together in the same order wherever its experts live. What remains of a difference is that
of a matrix product over another number of rows.

All ranks of the group run the same layers in the same order, in each step; a rank without work takes part with no rows of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from raycore.engines.torch.expert_map import BUCKETS, ExpertMap, LayerMap, destinations, fingerprint
from raycore.engines.torch.expert_slots import LayerSlots
from raycore.errors import LockstepError
from raycore.groups import ProcessGroup

EXPERTS_NAME = "raycore_exchange"
UNPLACED = 0
"""The size of the group of a rank that is in none yet, and holds no expert."""
_LAYER = "raycore_layer"
"""Attribute of a module of experts: its `ExpertLayer`."""


@final
class ExpertExchange:
    """What all layers share: the group, this rank's place in it, and what the step is."""

    def __init__(self, modules: Mapping[int, Any], placed: ExpertMap, experts: Mapping[int, int], *, rank: int, size: int) -> None:
        """`rank`, `size`: of the group that is to come; `experts`: how many each layer has."""
        self.rank = rank
        self.size = size
        self.word = 0
        """A number that every step tells all ranks; `words` has theirs, as of the last step."""
        self.words: list[int] = [0] * size
        self.fingerprint = fingerprint(placed)
        """Of the placement; every step tells it too, so that ranks that differ do not compute nonsense."""
        self.sent_rows = 0
        """Rows that other ranks computed for this one."""
        self.sent_bytes = 0
        """Of rows and their results, to other ranks."""
        self._group: ProcessGroup | None = None
        self.is_idle = False
        self.is_running = size == 1
        """False: a pass that only looks at shapes, for which the experts give zeros."""
        self.layers = {layer: ExpertLayer(self, module, placed[layer], experts[layer]) for layer, module in modules.items()}

    def adopt(self, placed: ExpertMap, *, rank: int, size: int) -> None:
        """Another placement, perhaps over other ranks, for coming steps; this rank's slots hold what it says."""
        self.rank, self.size = rank, size
        self.words = [0] * size
        self.is_running = self.is_running or size == 1
        for layer, state in self.layers.items():
            if layer in placed:
                state.place(placed[layer])
        self.fingerprint = fingerprint(self.placed)

    @property
    def is_alone(self) -> bool:
        """Whether this rank holds all experts, and exchanges nothing."""
        return self.size == 1

    @property
    def placed(self) -> ExpertMap:
        """The placement now."""
        return {layer: state.placed for layer, state in self.layers.items()}

    def set_group(self, group: ProcessGroup | None) -> None:
        """The group of coming steps."""
        self._group = group

    def swap_group(self, group: ProcessGroup | None) -> ProcessGroup | None:
        """The same; the group until now."""
        before, self._group = self._group, group
        return before

    def begin(self, *, is_idle: bool) -> None:
        """Before each forward pass. LockstepError without a group of the ranks that the placement is for."""
        self.is_idle = is_idle
        if not self.is_alone:
            self.group()
        self.is_running = True

    def group(self) -> ProcessGroup:
        """The group. LockstepError where there is none, or one of other ranks."""
        group = self._group
        if self.size == UNPLACED:
            raise LockstepError("this rank has not been given its experts yet")
        if group is None:
            raise LockstepError("the experts are on several ranks, and there is no process group to reach them")
        if (group.size, group.rank) != (self.size, self.rank):
            raise LockstepError(
                f"the experts are placed on {self.size} ranks, this one being {self.rank}; the process group has {group.size}, "
                f"this one being {group.rank}"
            )
        return group

    def hear(self, words: list[int], fingerprints: list[int]) -> None:
        """What all ranks told in this step. LockstepError when one has another placement than this one."""
        self.words = words
        others = [rank for rank, found in enumerate(fingerprints) if found != self.fingerprint]
        if others:
            raise LockstepError(f"group rank {others[0]} has another placement of experts than this one, {self.rank}")

    def load(self) -> dict[int, list[int]]:
        """By layer: how many of this rank's tokens each expert got since the last reset; an expert that computes a token counts it once."""
        return {layer: state.load.tolist() for layer, state in self.layers.items()}

    def reset_load(self) -> None:
        """Count from 0 again."""
        for state in self.layers.values():
            state.load.zero_()


@final
class ExpertLayer:
    """One layer's experts on this rank."""

    def __init__(self, exchange: ExpertExchange, module: Any, placed: LayerMap, experts: int) -> None:
        self.module = module
        self.experts = experts
        self._exchange = exchange
        self.slots = LayerSlots(module, placed.rows[exchange.rank])
        self.load = torch.zeros(experts, dtype=torch.int64, device=self.slots.rows.device)
        """[experts] int64."""
        self.place(placed)
        setattr(module, _LAYER, self)

    def place(self, placed: LayerMap) -> None:
        """Send coming tokens by this map."""
        self.placed = placed
        self._table = torch.tensor(destinations(placed, self.experts), dtype=torch.int64, device=self.load.device)

    def run(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, H], the router's experts [T, k] and their weights [T, k], to their weighted sums [T, H]."""
        exchange = self._exchange
        if not exchange.is_running:
            return torch.zeros_like(hidden)
        if not exchange.is_idle:
            flat = chosen.reshape(-1)
            self.load.scatter_add_(0, flat, torch.ones_like(flat))
        if exchange.is_alone:
            return _grouped(self.module, hidden, self.slots.rows[self._places(chosen)], weights)
        if exchange.is_idle:
            self._serve(hidden[:0], chosen.new_empty(0))
            return torch.zeros_like(hidden)
        places = self._places(chosen).reshape(-1)
        order = torch.argsort(places, stable=True)
        rows = hidden[order // chosen.shape[1]]
        results = torch.empty_like(rows)
        results[order] = self._serve(rows, places)
        weighted = results * weights.reshape(-1, 1)
        return weighted.view(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)

    def _places(self, chosen: torch.Tensor) -> torch.Tensor:
        """Where each (token, expert) goes, [T, k]: group rank * width + slot."""
        tokens = torch.arange(len(chosen), device=chosen.device) + self._exchange.rank
        return self._table[chosen, (tokens % BUCKETS)[:, None]]

    def _serve(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Send `rows` [S, H], which are ordered by place, compute what comes, and give back the results of those that were sent."""
        exchange, group = self._exchange, self._exchange.group()
        size, width = group.size, self.placed.width
        counts = torch.zeros(size, width + 2, dtype=torch.int64, device=rows.device)
        counts[:, :width] = torch.bincount(places, minlength=size * width).view(size, width)
        counts[:, width], counts[:, width + 1] = exchange.word, exchange.fingerprint
        came = torch.empty_like(counts)
        group.all_to_all(came, counts, [1] * size, [1] * size)
        sent_rows = counts[:, :width].sum(dim=1).tolist()
        table = came.tolist()
        exchange.hear([row[width] for row in table], [row[width + 1] for row in table])
        came_rows = [sum(row[:width]) for row in table]
        received = rows.new_empty(sum(came_rows), rows.shape[1])
        group.all_to_all(_as_bytes(received), _as_bytes(rows), came_rows, sent_rows)
        slots = torch.arange(width, device=rows.device).repeat(size).repeat_interleave(came[:, :width].flatten())
        if len(received):
            ones = received.new_ones(len(received), 1)
            received = _grouped(self.module, received, self.slots.rows[slots][:, None], ones)
        results = torch.empty_like(rows)
        group.all_to_all(_as_bytes(results), _as_bytes(received), sent_rows, came_rows)
        exchange.sent_rows += len(rows) - sent_rows[group.rank]
        away = len(rows) - sent_rows[group.rank] + len(received) - came_rows[group.rank]
        exchange.sent_bytes += away * rows.shape[1] * rows.element_size()
        return results


def _experts_forward(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What transformers calls for each module of experts."""
    layer = getattr(module, _LAYER, None)
    return torch.zeros_like(hidden) if layer is None else layer.run(hidden, chosen, weights)


def _grouped(module: Any, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, slots, weights)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[n, m] as [n, m * item size] uint8 of the same memory: Gloo does not know every dtype."""
    return tensor.contiguous().view(torch.uint8)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _experts_forward)
