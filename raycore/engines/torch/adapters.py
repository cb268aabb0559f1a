"""One LoRA adapter from a local peft directory, checked against the engine's model.

peft reads the configuration and fits the tensors to the modules, on a copy of the model without weights, so that its patterns, ranks and
scalings mean here what they mean there. What the batched application cannot do is refused by name.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raycore.errors import AdapterError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
)
"""Fields of peft's LoraConfig that change more than x·A·B is added, or where."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations after which the base weights are no longer those of the checkpoint."""
_DESCRIBES_MODEL = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")


@dataclass(slots=True, frozen=True)
class LoraWeights:
    """What one module adds: `down` [rank, in] and `up` [out, rank], the scaling already in it; on the host."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(slots=True, frozen=True)
class AdapterWeights:
    """An adapter's tensors by module name, in the model's dtype; `rank` is the largest of any module."""

    modules: dict[str, LoraWeights]
    rank: int

    @property
    def total_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(w.down.nbytes + w.up.nbytes for w in self.modules.values())


def load_adapter(path: str, model: PreTrainedModel, *, base: str, max_rank: int) -> AdapterWeights:
    """Read and check the adapter; `base` names the engine's model in errors. AdapterError says what is wrong with it."""
    try:
        folder = Path(path).expanduser()
        config = _read_config(folder)
        _check_config(config, model, base, max_rank)
        return _checked(_fit(folder, config, model), model, max_rank)
    except _WrongAdapter as problem:
        raise AdapterError(f"adapter {path!r}: {problem}") from problem.__cause__
    except (OSError, RuntimeError) as error:  # a name too long, a place that may not be looked at, a home that nobody has
        raise AdapterError(f"adapter {path!r}: {error}") from error


class _WrongAdapter(Exception):  # noqa: N818 -- becomes AdapterError with the adapter's name
    pass


def _read_config(folder: Path) -> LoraConfig:
    if not folder.is_dir():
        raise _WrongAdapter("there is no such directory (nothing is downloaded)")
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise _WrongAdapter(f"{' and '.join(missing)} missing; found {found}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise _WrongAdapter(f"{CONFIG_FILE} cannot be read: {error}") from error
    if type(config) is not LoraConfig:
        raise _WrongAdapter(f"its type is {config.peft_type}; only LORA is supported")
    return config


def _check_config(config: LoraConfig, model: PreTrainedModel, base: str, max_rank: int) -> None:
    used = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if config.bias != "none":
        used.append(f"bias={config.bias!r}")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.lower().startswith(_CHANGES_BASE):
        used.append(f"init_lora_weights={config.init_lora_weights!r} (convert it with peft's path_initial_model_for_weight_conversion)")
    if used:
        raise _WrongAdapter(f"it uses {', '.join(used)}, which is not supported")
    for name, value in (("base_model_name_or_path", config.base_model_name_or_path), ("revision", config.revision)):
        if not isinstance(value, str | None):
            raise _WrongAdapter(f"{CONFIG_FILE}: {name} must be text, not {value!r}")
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if wrong := [rank for rank in ranks if not isinstance(rank, int)]:
        raise _WrongAdapter(f"{CONFIG_FILE}: a rank must be an integer, not {wrong[0]!r}")
    rank = max(ranks)
    if rank > max_rank:
        raise _WrongAdapter(f"its rank is {rank}; the engine takes up to max_lora_rank={max_rank}")
    difference = _other_base(config.base_model_name_or_path, model)
    if difference:
        raise _WrongAdapter(f"it was made for another base model, {config.base_model_name_or_path!r}, not {base!r}: {difference}")


def _other_base(name: str | None, model: PreTrainedModel) -> str | None:
    """How the base model that the adapter names differs from this one, where it can be looked at: names alone say nothing."""
    file = Path(name or "") / "config.json"
    if not name or not file.is_file():
        return None
    try:
        theirs = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    ours = model.config.to_dict()
    for key in _DESCRIBES_MODEL:
        if key in theirs and key in ours and theirs[key] != ours[key]:
            return f"{key} is {theirs[key]!r} there and {ours[key]!r} here"
    return None


def _fit(folder: Path, config: LoraConfig, model: PreTrainedModel) -> dict[str, tuple[Any, Any]]:
    """The adapter's layers on a model without weights: each module's peft layer, and what it stands in for."""
    made_for = f" (its base model: {config.base_model_name_or_path!r})" if config.base_model_name_or_path else ""
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except Exception as error:
        raise _WrongAdapter(f"{WEIGHTS_FILE} cannot be read: {error}") from error
    _drop_base_weights(tensors, model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of what is checked below
            with torch.device("meta"):
                twin = type(model)(copy.deepcopy(model.config))
            fitted = PeftModel(twin, config, adapter_name=_NAME, low_cpu_mem_usage=True)
            for module in twin.modules():
                if isinstance(module, LoraLayer):
                    for part in (module.lora_A, module.lora_B):
                        part.to_empty(device="cpu")
            outcome: Any = set_peft_model_state_dict(fitted, tensors, adapter_name=_NAME)
    except Exception as error:
        raise _WrongAdapter(f"it does not fit this model{made_for}: {error}") from error
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    if missing:
        raise _WrongAdapter(f"{WEIGHTS_FILE} lacks {missing[0]}")
    if outcome.unexpected_keys:
        raise _WrongAdapter(f"it does not fit this model{made_for}: no place for {outcome.unexpected_keys[0]}")
    return {name: (module, module.get_base_layer()) for name, module in twin.named_modules() if isinstance(module, LoraLayer)}


def _drop_base_weights(tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> None:
    """peft saves the embeddings beside an adapter of the head; here they must be the ones that the model has, for all its users."""
    ours = model.state_dict()
    for key in [key for key in tensors if "lora_" not in key]:
        theirs = tensors.pop(key)
        own = ours.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if own is None or own.shape != theirs.shape or not torch.equal(own.cpu(), theirs.to(own.dtype)):
            raise _WrongAdapter(f"it brings base weights of its own that are not those of this model: {key}")


def _checked(layers: dict[str, tuple[Any, Any]], model: PreTrainedModel, max_rank: int) -> AdapterWeights:
    ours: dict[str, Any] = dict(model.named_modules())
    modules: dict[str, LoraWeights] = {}
    for name, (layer, base) in layers.items():
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise _WrongAdapter(f"it changes {name}, a {type(base).__name__}; only linear layers are supported")
        down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        if down.shape[0] > max_rank:
            raise _WrongAdapter(f"its rank is {down.shape[0]} at {name}; the engine takes up to max_lora_rank={max_rank}")
        dtype = ours[name].weight.dtype
        # Scaled in float32, once, instead of at every step.
        scaled = (up.detach().float() * layer.scaling[_NAME]).to(dtype)
        if not (torch.isfinite(down.to(dtype)).all() and torch.isfinite(scaled).all()):
            raise _WrongAdapter(f"its tensors of {name}, scaled by {layer.scaling[_NAME]}, are not finite in {dtype}")
        modules[name] = LoraWeights(down.detach().to(dtype).contiguous(), scaled.contiguous())
    if not modules:
        raise _WrongAdapter("it changes no module of this model")
    return AdapterWeights(modules, max(w.down.shape[0] for w in modules.values()))
