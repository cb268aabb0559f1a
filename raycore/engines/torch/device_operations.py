"""The lean forward pass's operations on a GPU: one kernel each."""

from __future__ import annotations

import torch

from raycore.engines.torch import kernels
from raycore.engines.torch.attention import AttentionCall, PagedStep
from raycore.engines.torch.device_step import TiledStep
from raycore.engines.torch.lean import PlainOperations, Rotation


class DeviceOperations:
    """By the kernels; an Operations."""

    def __init__(self) -> None:
        self._plain = PlainOperations()

    def project(self, module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """As the module does it."""
        return module(hidden)

    def normalise(self, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """One kernel, in float32 within."""
        return kernels.normalise(hidden, weight, epsilon)

    def add_and_normalise(self, hidden: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """One kernel."""
        return kernels.normalise(hidden, weight, epsilon, more=more)

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """One kernel."""
        return kernels.gate(gate, up)

    def attend(
        self,
        step: PagedStep,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotation: Rotation,
        call: AttentionCall,
    ) -> torch.Tensor:
        """One kernel rotates and stores, one or two attend."""
        if not isinstance(step, TiledStep):
            return self._plain.attend(step, layer, query, key, value, rotation, call)
        cache = step.cache
        query = kernels.rotate_and_store(cache.keys[layer], cache.values[layer], step.slots, query, key, value, rotation.cos, rotation.sin)
        return step.attend_stored(layer, query, call)
