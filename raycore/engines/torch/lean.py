"""The forward pass of Llama-like models, over the same modules as transformers' own, with fewer and larger operations.

transformers' modules spend several small operations, and several Python frames, on each normalisation, rotation and residual. In a decode
step on a CPU that is up to half of the time of a small model; on a GPU each is a kernel of its own. Here they are one call each, by
`Operations` of the device. Projections, embedding and head are called as modules, so hooks on them work as before.

Which models: those of the listed types whose logits agree with transformers' own when the engine is made (`lean_decoder`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from raycore.engines.torch.attention import AttentionCall, PagedStep, run_model

_log = logging.getLogger(__name__)

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Decoders of the Llama plan; qwen2 adds biases, qwen3 normalises the heads of query and key."""
_TRANSPOSED_ROWS = range(6, 65)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest difference of two forward passes' logits, as a share of their norm, that rounding explains."""

Embeds = Sequence[tuple[int, torch.Tensor]]
"""Embeddings [n, hidden] that stand for the n ids from a row on."""


class Forward(Protocol):
    """A model's forward pass over a flat batch."""

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, step: PagedStep, rows: torch.Tensor | int, embeds: Embeds = ()
    ) -> torch.Tensor:
        """Ids and positions [1, T], the step's attention, rows [S] or 0 for all; to logits [S, vocabulary]."""
        ...


@dataclass(slots=True, frozen=True)
class Rotation:
    """A step's rotary embedding: `cos` and `sin` [T, 1, dim], `sin` negated in its first half."""

    cos: torch.Tensor
    sin: torch.Tensor


class Operations(Protocol):
    """What a device does in and between the projections; hidden states are [T, size]."""

    def project(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the module would give, with its hooks, in any memory order."""
        ...

    def normalise(self, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Root-mean-square normalisation over the last dimension."""
        ...

    def add_and_normalise(self, hidden: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Add `more` to `hidden` in place, and normalise the sum."""
        ...

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up; `gate` may be overwritten."""
        ...

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
        """Rotate query [T, heads, dim] and key [T, kv_heads, dim], and attend; returns [T, heads, dim]."""
        ...


class PlainOperations:
    """By torch's operators, on any device."""

    def project(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Middling batches in float32 on a CPU as weight times transposed rows; others as the module does it.

        MKL takes a third less time for that form of a product of 8 to 32 rows (`docs/torch-engine.md`), and none less for few or many.
        """
        if (
            len(hidden) not in _TRANSPOSED_ROWS
            or type(module) is not nn.Linear
            or module._forward_hooks  # noqa: SLF001 -- there is no public way to ask
            or hidden.device.type != "cpu"
            or hidden.dtype != torch.float32
        ):
            return module(hidden)
        if module.bias is None:
            return torch.mm(module.weight, hidden.t()).t()
        return torch.addmm(module.bias[:, None], module.weight, hidden.t()).t()

    def normalise(self, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """One composite operator, in float32 within."""
        return torch.rms_norm(hidden, weight.shape, weight, epsilon)

    def add_and_normalise(self, hidden: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Two operators."""
        return torch.rms_norm(hidden.add_(more), weight.shape, weight, epsilon)

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Two operators and one new tensor."""
        return functional.silu(gate).mul_(up)

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
        """Query and key are rotated together: x cos + swapped(x) sin, with the sign in the sine."""
        heads = query.shape[1]
        both = torch.cat((query, key), 1)
        turned = torch.addcmul(both * rotation.cos, both.roll(both.shape[-1] // 2, -1), rotation.sin)
        return step.attend(layer, turned[:, :heads], turned[:, heads:], value, call)


@dataclass(slots=True, frozen=True)
class _Layer:
    before_attention: Any
    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_norm: Any
    key_norm: Any
    output: nn.Module
    call: AttentionCall
    head_dim: int
    before_mlp: Any
    gate: nn.Module
    up: nn.Module
    down: nn.Module


class LeanDecoder:
    """A Forward over the modules of one model."""

    def __init__(self, model: Any, operations: Operations, calls: Mapping[int, AttentionCall]) -> None:
        """`calls`: each layer's settings. Raises AttributeError, KeyError or TypeError for a model of another plan."""
        body = model.model
        self._embed, self._rotary, self._norm, self._head = body.embed_tokens, body.rotary_emb, body.norm, model.lm_head
        self._layers = [_take_apart(layer, calls[index]) for index, layer in enumerate(body.layers)]
        self._operations = operations

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, step: PagedStep, rows: torch.Tensor | int, embeds: Embeds = ()
    ) -> torch.Tensor:
        """See Forward."""
        operations, layers = self._operations, self._layers
        hidden = self._embed(ids[0])
        for begin, values in embeds:
            hidden[begin : begin + len(values)] = values
        cos, sin = self._rotary(hidden[None], positions)
        half = cos.shape[-1] // 2
        rotation = Rotation(cos[0, :, None], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)[:, None])
        norm = layers[0].before_attention
        normal = operations.normalise(hidden, norm.weight, norm.variance_epsilon)
        for index, layer in enumerate(layers):
            shape = (len(normal), -1, layer.head_dim)
            query, key, value = (operations.project(m, normal).reshape(shape) for m in (layer.query, layer.key, layer.value))
            if layer.query_norm is not None:
                query = operations.normalise(query, layer.query_norm.weight, layer.query_norm.variance_epsilon)
                key = operations.normalise(key, layer.key_norm.weight, layer.key_norm.variance_epsilon)
            seen = operations.attend(step, index, query, key, value, rotation, layer.call)
            more = operations.project(layer.output, seen.reshape(len(seen), -1))
            norm = layer.before_mlp
            normal = operations.add_and_normalise(hidden, more, norm.weight, norm.variance_epsilon)
            gated = operations.gate(operations.project(layer.gate, normal), operations.project(layer.up, normal))
            more = operations.project(layer.down, gated)
            norm = layers[index + 1].before_attention if index + 1 < len(layers) else self._norm
            if norm is self._norm and isinstance(rows, torch.Tensor):
                hidden, more = hidden[rows], more[rows]
            normal = operations.add_and_normalise(hidden, more, norm.weight, norm.variance_epsilon)
        return operations.project(self._head, normal)


@dataclass(slots=True, frozen=True)
class _Recorder:
    """A step that notes each layer's settings as transformers gives them."""

    step: PagedStep
    calls: dict[int, AttentionCall]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        self.calls[layer] = call
        return self.step.attend(layer, query, key, value, call)


@torch.inference_mode()
def lean_decoder(
    model: PreTrainedModel, operations: Operations, inputs: tuple[torch.Tensor, torch.Tensor, PagedStep]
) -> LeanDecoder | None:
    """The lean forward pass of `model`, or None where the model is of another type or the two passes over `inputs` disagree.

    `inputs`: ids and positions [1, T] of a sequence's first tokens, and their step.
    """
    if model.config.get_text_config().model_type not in MODEL_TYPES:
        return None
    name = type(model).__name__
    ids, positions, step = inputs
    calls: dict[int, AttentionCall] = {}
    expected = run_model(model, ids, positions, _Recorder(step, calls), 0).float()
    try:
        decoder = LeanDecoder(model, operations, calls)
        logits = decoder(ids, positions, step, 0).float()
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        _log.warning("%s runs by its own modules: %s", name, error)
        return None
    difference = float(torch.linalg.norm(logits - expected) / torch.linalg.norm(expected))
    if not difference <= TOLERANCE[model.dtype]:  # not: a NaN is no agreement
        _log.warning("%s runs by its own modules: the lean forward pass differs by %.2g", name, difference)
        return None
    return decoder


def _take_apart(layer: Any, call: AttentionCall) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    probe = torch.linspace(-4.0, 4.0, 9)
    if not torch.allclose(mlp.act_fn(probe), functional.silu(probe)):
        raise TypeError(f"its activation is {type(mlp.act_fn).__name__}")
    return _Layer(
        before_attention=layer.input_layernorm,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        output=attention.o_proj,
        call=call,
        head_dim=attention.head_dim,
        before_mlp=layer.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )
