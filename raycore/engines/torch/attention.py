"""Attention over the paged cache, as a function of transformers' attention interface.

The model runs on one flat row of tokens [1, T]; this function alone knows where one sequence ends and the next begins. It gets
the step through the keyword argument `paged`, which models that support attention backends pass on to every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from raycore.engines.torch.batch import NO_WINDOW, StepBatch
from raycore.engines.torch.kv_cache import KVCache, LayerShape
from raycore.engines.torch.windows import WindowStep

ATTENTION_NAME = "raycore_paged"
"""Not registered with the mask interface, so that models build no mask of their own."""


class PagedStep(Protocol):
    """What the attention function does with one layer's projections in this step."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Query [T, heads, dim], key and value [T, kv_heads, dim], of any strides but the last, to an output [T, heads, dim]."""
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
        self.layers[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2], query.shape[1])
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


@dataclass(slots=True)
class CachedStep:
    """Writes new keys and values to the cache and attends to it."""

    cache: KVCache
    batch: StepBatch
    window: WindowStep | None = None
    """The decodes' dense copy, where one is kept."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """All decodes at once, prompt chunks one by one."""
        self.cache.write(layer, self.batch.slots, key, value)
        parts = [self._attend_decodes(layer, query, key, value, call)] if self.batch.decodes else []
        for index, span in enumerate(self.batch.spans):
            rows = slice(span.begin, span.end)
            mask = self.batch.span_mask(index, call.window)
            if mask is None:
                span_key, span_value = key[None, rows].transpose(1, 2), value[None, rows].transpose(1, 2)
            else:
                span_key, span_value = self.cache.gather(layer, span.table)
            parts.append(_dense(query[None, rows].transpose(1, 2), span_key, span_value, mask, call)[0].transpose(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_decodes(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        batch, window = self.batch, self.window
        _, heads, dim = query.shape
        kv_heads = key.shape[1]
        # The query heads that share a key head stand where query positions do: keys are then read once per group, not copied per head.
        grouped = query[: batch.decodes].reshape(batch.decodes, kv_heads, heads // kv_heads, dim)
        if window is not None:
            key, value = window.append(layer, key[: batch.decodes], value[: batch.decodes])
            if window.order is not None:
                grouped = grouped.index_select(0, window.order)
            mask = window.mask(call.window, heads // kv_heads, query.dtype)
            output = _dense(grouped, key, value, mask, call, is_causal=False)
            if window.places is not None:
                output = output.index_select(0, window.places)
            return output.reshape(batch.decodes, heads, -1)
        run = batch.lone_run(call.window)
        if run is not None and call.softcap is None:
            key, value = self.cache.view(layer, run)
            output = functional.scaled_dot_product_attention(grouped, key, value, scale=call.scale)
        else:
            key, value = self.cache.gather(layer, batch.tables)
            output = _dense(grouped, key, value, batch.decode_mask(call.window, heads // kv_heads), call)
        return output.reshape(batch.decodes, heads, -1)


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, call: AttentionCall, *, is_causal: bool = True
) -> torch.Tensor:
    """Softmax attention; without a mask it is causal, or, where it is not to be, over all keys."""
    if call.softcap is not None:
        if mask is None and not is_causal:
            mask = query.new_zeros(1, 1, 1, 1)
        return _softcapped(query, key, value, mask, call)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal and mask is None, scale=call.scale, enable_gqa=query.shape[1] != key.shape[1]
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
    """The registered function; query [1, heads, T, dim] to [1, T, heads, dim]. Raises NotImplementedError for attention sinks."""
    del attention_mask
    if s_aux is not None:
        raise NotImplementedError("attention sinks (s_aux)")
    layer = module.layer_idx
    assert isinstance(layer, int)  # noqa: S101
    call = AttentionCall(scaling, sliding_window or NO_WINDOW, softcap)
    return paged.attend(layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), call)[None], None


def run_model(
    model: PreTrainedModel,
    ids: torch.Tensor,
    positions: torch.Tensor,
    step: PagedStep,
    rows: torch.Tensor | int,
    embeds: Sequence[tuple[int, torch.Tensor]] = (),
) -> torch.Tensor:
    """Logits [S, vocabulary] of a flat batch: ids and positions [1, T], rows [S] (or 0: all); every layer attends through `step`.

    `embeds`: embeddings [n, hidden] that stand for the n ids from a row on.
    """
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False, "logits_to_keep": rows, "paged": step}
    if embeds:  # a model takes ids or embeddings, not both
        embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
        for begin, values in embeds:
            embedded[0, begin : begin + len(values)] = values
        inputs["inputs_embeds"] = embedded
    return model(**inputs).logits[0]


AttentionInterface.register(ATTENTION_NAME, paged_attention)
