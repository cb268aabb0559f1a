"""Attention over the paged cache, as a function of transformers' attention interface.

The model runs on one flat row of tokens [1, T]; this function alone knows where one sequence ends and the next begins. It gets
the step through the keyword argument `paged`, which models that support attention backends pass on to every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface

from raycore.engines.torch.batch import NO_WINDOW, StepBatch
from raycore.engines.torch.kv_cache import KVCache, LayerShape

ATTENTION_NAME = "raycore_paged"
"""Not registered with the mask interface, so that models build no mask of their own."""


class PagedStep(Protocol):
    """What the attention function does with one layer's projections in this step."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Query [1, heads, T, dim], key and value [1, kv_heads, T, dim] to an output [T, heads, dim]."""
        ...


@dataclass(slots=True, frozen=True)
class AttentionCall:
    """One layer's settings."""

    scale: float | None
    window: int
    softcap: float | None


@dataclass(slots=True)
class ShapeProbe:
    """Learns from one forward pass what each layer stores, whatever the configuration calls it."""

    layers: dict[int, LayerShape] = field(default_factory=dict)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Note the shapes and answer zeros."""
        del call
        self.layers[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros(query.shape[2], query.shape[1], value.shape[3])


@dataclass(slots=True)
class CachedStep:
    """Writes new keys and values to the cache and attends to it."""

    cache: KVCache
    batch: StepBatch

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """All decodes at once, prompt chunks one by one."""
        self.cache.write(layer, self.batch.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        parts = [self._attend_decodes(layer, query, key.shape[1], call)] if self.batch.decodes else []
        for index, span in enumerate(self.batch.spans):
            rows = slice(span.begin, span.end)
            mask = self.batch.span_mask(index, call.window)
            if mask is None:
                span_key, span_value = key[:, :, rows], value[:, :, rows]
            else:
                span_key, span_value = self.cache.gather(layer, span.table)
            parts.append(_dense(query[:, :, rows], span_key, span_value, mask, call)[0].transpose(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_decodes(self, layer: int, query: torch.Tensor, kv_heads: int, call: AttentionCall) -> torch.Tensor:
        batch = self.batch
        heads, dim = query.shape[1], query.shape[3]
        key, value = self.cache.gather(layer, batch.tables)
        # The query heads that share a key head stand where query positions do: keys are then read once per group, not copied per head.
        grouped = query[0, :, : batch.decodes].transpose(0, 1).reshape(batch.decodes, kv_heads, heads // kv_heads, dim)
        output = _dense(grouped, key, value, batch.decode_mask(call.window, heads // kv_heads), call)
        return output.reshape(batch.decodes, heads, -1)


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, call: AttentionCall) -> torch.Tensor:
    """Softmax attention; without a mask it is causal."""
    if call.softcap is not None:
        return _softcapped(query, key, value, mask, call)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=call.scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, call: AttentionCall
) -> torch.Tensor:
    """The same with scores bounded by tanh before the mask (Gemma 2), which fused kernels do not offer."""
    assert call.softcap is not None  # noqa: S101
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if mask is None:
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu_(1)
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
    scale = call.scale if call.scale is not None else query.shape[-1] ** -0.5
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / call.softcap)) * call.softcap + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The registered function; returns [1, T, heads, dim]. Raises NotImplementedError for attention sinks."""
    del attention_mask
    if s_aux is not None:
        raise NotImplementedError("attention sinks (s_aux)")
    layer = module.layer_idx
    assert isinstance(layer, int)  # noqa: S101
    call = AttentionCall(scaling, sliding_window or NO_WINDOW, softcap)
    return paged.attend(layer, query, key, value, call)[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
