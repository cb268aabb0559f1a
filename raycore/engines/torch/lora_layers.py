"""LoRA in the forward pass: the adapters of all requests of a batch at once, over the flat row of tokens.

The active adapters' matrices stand side by side: one product gives every row its values under all of them, a mask keeps those of the
row's own adapter, and a second product adds them. That is two products a layer however many adapters there are. One pair of products for
each adapter over its own rows does less arithmetic and costs more (`docs/torch-engine.md`); peft's own mixed batches choose adapters
along the batch dimension, which the flat row does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from raycore.engines.torch.lora import Adapter

BASE = -1
"""The owner of rows without an adapter."""


class LoraLayers:
    """Adds to the outputs of the modules that adapters change; costs nothing while no adapter is loaded."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._head = model.get_output_embeddings()
        self._packed: tuple[Adapter, ...] = ()
        self._down: dict[str, torch.Tensor] = {}
        self._up: dict[str, torch.Tensor] = {}
        self._column_owner: torch.Tensor | None = None
        self._hooks: list[Any] = []
        self._hidden: torch.Tensor | None = None
        self._hidden_in_head: torch.Tensor | None = None

    @property
    def total_bytes(self) -> int:
        """Device memory of the adapters that the last batch used."""
        return sum(t.nbytes for part in (self._down, self._up) for t in part.values())

    def begin(self, chunks: Sequence[tuple[Adapter | None, int, bool, int]]) -> bool:
        """What the next forward pass has in its flat row, by chunk: the adapter, how many tokens, and which of them get logits.

        These are the last one, if the flag says so, and as many prompt tokens as the last number says, behind those of all chunks.
        Returns whether the modules must be called for it, with the hooks that are on them then.
        """
        active = sorted({a for a, _, _, _ in chunks if a is not None}, key=lambda a: a.lora_id)
        if not active:
            self.end()
            return False
        if not self._covers(active):
            self._pack(active)
        assert self._column_owner is not None  # noqa: S101
        place: dict[Adapter | None, int] = {adapter: index for index, adapter in enumerate(self._packed)}
        owners = np.array([place.get(adapter, BASE) for adapter, _, _, _ in chunks])
        counts = np.array([count for _, count, _, _ in chunks])
        is_last = np.array([last for _, _, last, _ in chunks])
        prompt_logits = np.array([logits for _, _, _, logits in chunks])
        self._hidden = self._mask(owners.repeat(counts))
        # The head sees these rows only.
        self._hidden_in_head = self._mask(np.concatenate([owners[is_last], owners.repeat(prompt_logits)]))
        return True

    def end(self) -> None:
        """The forward pass is over, or has no rows with an adapter."""
        self._hidden = self._hidden_in_head = None

    def release(self) -> None:
        """Free everything on the device; the next batch with an adapter brings back what it needs."""
        self.end()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._packed, self._column_owner = (), None
        self._down.clear()
        self._up.clear()

    def _mask(self, owners: np.ndarray) -> torch.Tensor:
        """[rows, columns]: where a row's values are under an adapter that is not its own."""
        assert self._column_owner is not None  # noqa: S101
        return torch.from_numpy(owners).to(self._column_owner.device)[:, None] != self._column_owner

    def _covers(self, active: Sequence[Adapter]) -> bool:
        """Whether what is packed serves these; a few columns too many cost less than packing anew when a request ends."""
        return set(active) <= set(self._packed) and len(self._packed) <= 2 * len(active)

    def _pack(self, adapters: Sequence[Adapter]) -> None:
        self.release()
        modules = dict(self._model.named_modules())
        total = sum(a.weights.rank for a in adapters)
        begins = np.cumsum([0, *(a.weights.rank for a in adapters)])
        for name in {name for adapter in adapters for name in adapter.weights.modules}:
            some = next(a.weights.modules[name] for a in adapters if name in a.weights.modules)
            down, up = some.down.new_zeros(total, some.down.shape[1]), some.up.new_zeros(some.up.shape[0], total)
            for adapter, begin in zip(adapters, begins, strict=False):
                own = adapter.weights.modules.get(name)
                if own is not None:
                    rows = slice(int(begin), int(begin) + own.down.shape[0])
                    down[rows], up[:, rows] = own.down, own.up
            device = self._model.device
            self._down[name], self._up[name] = down.to(device), up.to(device)
            self._hooks.append(modules[name].register_forward_hook(partial(self._add, name)))
        owner = np.repeat(np.arange(len(adapters)), [a.weights.rank for a in adapters])
        self._column_owner = torch.from_numpy(owner).to(self._model.device)
        self._packed = tuple(adapters)

    def _add(self, name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        hidden = self._hidden_in_head if module is self._head else self._hidden
        if hidden is None:
            return None
        # Filled, not multiplied by 0: what overflows under one adapter must not reach the rows of another.
        inner = functional.linear(inputs[0], self._down[name]).masked_fill_(hidden, 0)
        return output + functional.linear(inner, self._up[name])
