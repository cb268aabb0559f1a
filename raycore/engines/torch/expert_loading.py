"""Loading one rank's share of a mixture-of-experts checkpoint: everything but the experts, and the experts of its own slots.

transformers converts a checkpoint's tensors to the model's by rules per model (experts stored one by one are stacked, gate and up are
joined). It is handed a state dict of lazy slices in which this rank's experts are numbered by slot, and a model whose expert tensors have
room for the slots only: so its rules do the work for every model, and no other rank's expert is ever read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from raycore.engines.torch.attention import ATTENTION_NAME
from raycore.engines.torch.expert_exchange import EXPERTS_NAME
from raycore.engines.torch.expert_map import EMPTY_SLOT
from raycore.engines.torch.loading import Source, choose_device, choose_dtype, load_config, loading_counted
from raycore.engines.torch.options import TorchEngineOptions
from raycore.errors import ConfigurationError

_EXPERT_KEY = re.compile(r"^(?P<head>.*\.experts\.)(?P<rest>.+)$")
"""A checkpoint's names of experts, in every model that transformers has: `….experts.3.w1.weight`, or `….experts.gate_up_proj`."""
_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed")
"""What transformers' experts interface gives a module of stacked experts."""


@dataclass(slots=True, frozen=True)
class ExpertModel:
    """What is known of a mixture-of-experts model before its weights are read."""

    kind: type[PreTrainedModel]
    config: PreTrainedConfig
    experts: dict[int, int]
    """How many each layer has."""


def find_expert_model(source: Source) -> ExpertModel | None:
    """The model's experts, if it has any and they go through transformers' experts interface; reads no weights."""
    return None if source.gguf else expert_model_of(load_config(source))


def expert_model_of(config: PreTrainedConfig) -> ExpertModel | None:
    """The same, of a configuration."""
    if not any("expert" in name for name in config.get_text_config().to_dict()):
        return None
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    except ValueError:  # not a causal language model
        return None
    modules = experts_of(skeleton)
    if not modules:
        return None
    return ExpertModel(type(skeleton), config, {layer: int(module.num_experts) for layer, module in modules.items()})


def experts_of(model: nn.Module) -> dict[int, Any]:
    """The modules of stacked experts by layer number. ConfigurationError where a layer has two."""
    found: dict[int, Any] = {}
    for path, module in model.named_modules():
        if not all(hasattr(module, mark) for mark in _MARKS):
            continue
        layer = _layer_of(path)
        if layer in found:
            raise ConfigurationError(f"expert parallelism: layer {layer} has more than one set of experts ({path})")
        found[layer] = module
    return found


def load_share(source: Source, options: TorchEngineOptions, found: ExpertModel, slots: Mapping[int, Sequence[int]]) -> PreTrainedModel:
    """The model with `slots[layer]` as its experts, by slot, on its device. ConfigurationError when it cannot be loaded so."""
    if getattr(found.config, "quantization_config", None) is not None:
        raise ConfigurationError("expert parallelism takes no quantised checkpoint; set expert_parallel=False")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if dtype == "auto":
        dtype = getattr(found.config, "dtype", None) or torch.float32
    try:
        with contextlib.ExitStack() as files, loading_counted():
            state = _own_state(source.directory, found, slots, files)
            kind: Any = _with_room_for(found.kind, slots)
            model, info = kind.from_pretrained(
                None,
                config=found.config,
                state_dict=state,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                experts_implementation=EXPERTS_NAME,
                output_loading_info=True,
            )
    except Exception as error:
        raise ConfigurationError(f"cannot load model {str(source.directory)!r}: {error}") from error
    problems = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if problems:
        raise ConfigurationError(f"model {str(source.directory)!r} lacks {problems[0]}, or has it in another shape")
    model.__class__ = found.kind
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(str(source.directory), local_files_only=True)
    return model.to(device).eval().requires_grad_(False)


def empty_share(found: ExpertModel) -> PreTrainedModel:
    """The model on the meta device with room for no expert: one empty slot in each layer."""
    kind: Any = _with_room_for(found.kind, {layer: own_slots(()) for layer in found.experts})
    with torch.device("meta"):
        model = kind._from_config(found.config, attn_implementation=ATTENTION_NAME, experts_implementation=EXPERTS_NAME)  # noqa: SLF001 -- what `from_config` of transformers' automatic classes calls, which know no other class
    model.__class__ = found.kind
    return model


def room_for(module: Any, slots: int) -> dict[str, torch.Size]:
    """Shapes of a module's expert tensors with so many slots, by name."""
    count = int(module.num_experts)
    return {
        name: torch.Size((slots, *parameter.shape[1:]))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() and parameter.shape[0] == count
    }


def own_slots(row: Sequence[int]) -> tuple[int, ...]:
    """A rank's row as it is held: a rank without experts keeps one empty slot, since tensors of no rows are special everywhere."""
    return tuple(row) or (EMPTY_SLOT,)


def _with_room_for(kind: type[PreTrainedModel], slots: Mapping[int, Sequence[int]]) -> type[PreTrainedModel]:
    """The model's class, but its expert tensors are made for the slots."""

    def make(self: PreTrainedModel, *arguments: Any, **keywords: Any) -> None:
        kind.__init__(self, *arguments, **keywords)
        for layer, module in experts_of(self).items():
            for name, shape in room_for(module, len(slots[layer])).items():
                old = getattr(module, name)
                setattr(module, name, nn.Parameter(torch.empty(shape, dtype=old.dtype, device="meta"), requires_grad=False))
            module.num_experts = len(slots[layer])

    return type(kind.__name__, (kind,), {"__init__": make, "__module__": kind.__module__})


def _own_state(directory: Path, found: ExpertModel, slots: Mapping[int, Sequence[int]], files: contextlib.ExitStack) -> dict[str, Any]:
    """Lazy tensors by the checkpoint's names, this rank's experts numbered by slot and no others."""
    state: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        shard = files.enter_context(safe_open(path, framework="pt"))
        for key in shard.keys():  # noqa: SIM118 -- not a mapping
            state.update(_own_part(key, shard.get_slice(key), found, slots))
    return state


def _own_part(key: str, stored: Any, found: ExpertModel, slots: Mapping[int, Sequence[int]]) -> Iterator[tuple[str, Any]]:
    match = _EXPERT_KEY.match(key)
    layer = _layer_of(key)
    if match is None or layer not in slots:
        yield key, stored
        return
    first, _, rest = match["rest"].partition(".")
    own = slots[layer]
    if first.isdigit():
        for slot, expert in enumerate(own):
            if expert == int(first):
                yield f"{match['head']}{slot}.{rest}", stored
            elif expert == EMPTY_SLOT and first == "0":
                yield f"{match['head']}{slot}.{rest}", _Rows(stored, None)
    elif stored.get_shape()[0] == found.experts[layer]:
        yield key, _Rows(stored, own)
    else:
        yield key, stored


class _Rows:
    """Some rows of a stored tensor, read when they are asked for; `rows` None: zeros in the shape of the whole."""

    def __init__(self, stored: Any, rows: Sequence[int] | None) -> None:
        self._stored = stored
        self._rows = rows

    def __getitem__(self, _all: Any) -> torch.Tensor:
        if self._rows is None:
            return self._stored[0:0].new_zeros(self._stored.get_shape())  # nothing is read but the dtype
        zeros = self._stored[0:0].new_zeros(self._stored.get_shape()[1:])
        return torch.stack([zeros if row == EMPTY_SLOT else self._stored[row] for row in self._rows])


def _layer_of(path: str) -> int:
    """The first number in a module's or tensor's name; -1: none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)
