"""A change of placement while the engine serves: experts come from their holders beside the live ones, then the pointers move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch

from raycore.engines.torch.expert_moves import SwapPlan, Transfer, portions, transfers
from raycore.engines.torch.expert_slots import CHECKSUM_BYTES, LayerSlots
from raycore.groups import ProcessGroup


@final
class ExpertSwap:
    """One rank's part in one `SwapPlan`; every rank of `group` calls the same methods in the same order.

    `group` carries the bytes and need not be the one that serves; it has the ranks that the plan's rows are numbered by. Nothing that
    is live changes before `switch`.
    """

    def __init__(self, plan: SwapPlan, group: ProcessGroup, layers: Mapping[int, LayerSlots], budget_bytes: int) -> None:
        """`budget_bytes`: what a rank sends, and what it receives, in one `advance` at most, but for an expert that is larger alone."""
        self.plan = plan
        self.received_bytes = 0
        self.sent_bytes = 0
        self._group = group
        self._layers = layers
        self._bytes = {layer: slots.expert_bytes + CHECKSUM_BYTES for layer, slots in layers.items()}
        carried = transfers(plan, self._bytes)
        self._portions = list(portions(carried, self._bytes, budget_bytes))
        self._waiting = [layer for layer in sorted(plan.after) if plan.after[layer].rows[group.rank] != layers[layer].slots]
        self._prepared: list[int] = []
        self._done = 0

    @property
    def rank(self) -> int:
        """This rank in the carrying group."""
        return self._group.rank

    @property
    def is_complete(self) -> bool:
        """Whether all experts have come."""
        return self._done == len(self._portions)

    @property
    def total_bytes(self) -> int:
        """What all ranks together carry."""
        return sum(self._bytes[transfer.layer] for portion in self._portions for transfer in portion)

    def advance(self) -> bool:
        """Carry the next portion; whether all have come. LockstepError when a rank is lost, or an expert arrives damaged."""
        if not self.is_complete:
            portion = self._portions[self._done]
            self._prepare_up_to(portion[0].layer)
            self._carry(portion)
            self._done += 1
        if self.is_complete:
            self._prepare_up_to(None)
        return self.is_complete

    def switch(self) -> None:
        """The pointers move on this rank; nothing is sent or computed."""
        for layer in self._prepared:
            self._layers[layer].switch()

    def revert(self) -> None:
        """Back to what was live before `switch`, while `drop` has not been called."""
        for layer in self._prepared:
            self._layers[layer].revert()

    def drop(self) -> None:
        """Free what is not live: before `switch` what came, afterwards what was. Idempotent."""
        for layer in self._prepared:
            self._layers[layer].drop()
        self._prepared = []

    def _prepare_up_to(self, layer: int | None) -> None:
        """Rooms are made as they are needed, so that an operation that is undone early has allocated little."""
        while self._waiting and (layer is None or self._waiting[0] <= layer):
            following = self._waiting.pop(0)
            self._layers[following].prepare(self.plan.after[following].rows[self._group.rank])
            self._prepared.append(following)

    def _carry(self, portion: list[Transfer]) -> None:
        rank, size = self._group.rank, self._group.size
        going = sorted((t for t in portion if t.source == rank), key=lambda t: t.target)
        coming = sorted((t for t in portion if t.target == rank), key=lambda t: t.source)
        device = next(iter(self._layers.values())).rows.device
        sent = [self._layers[t.layer].read(t.expert) for t in going]
        buffer = torch.cat(sent) if sent else torch.empty(0, dtype=torch.uint8, device=device)
        received = torch.empty(sum(self._bytes[t.layer] for t in coming), dtype=torch.uint8, device=device)
        sent_rows = [sum(self._bytes[t.layer] for t in going if t.target == peer) for peer in range(size)]
        received_rows = [sum(self._bytes[t.layer] for t in coming if t.source == peer) for peer in range(size)]
        self._group.all_to_all(received, buffer, received_rows, sent_rows)
        at = 0
        for transfer in coming:
            end = at + self._bytes[transfer.layer]
            self._layers[transfer.layer].write(transfer.expert, received[at:end])
            at = end
        self.sent_bytes += len(buffer)
        self.received_bytes += len(received)
