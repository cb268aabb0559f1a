"""A mixture of experts made of a dense Llama-like model, which computes what the dense one computes (sparse upcycling: Komatsuzaki 2023).

Every expert is the dense feed-forward layer with its hidden neurons in another order: the same function from different bytes, so that
checksums tell the experts apart. The router is random; it renormalises the weights of the experts that it chooses, so that they add up to 1
whichever they are. Texts of the result can therefore be checked against the dense model at any expert-parallel size.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from raycore.engines.torch.loading import find_source, load_model, load_tokenizer_of
from raycore.engines.torch.options import DTYPES, TorchEngineOptions
from raycore.errors import ConfigurationError, SaveError

DENSE_TYPES = ("llama", "mistral")
"""Model types whose attention, norms and gated feed-forward layers are those of Mixtral."""
_TAKEN_OVER = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_MLP = (("w1", "gate_proj", 0), ("w3", "up_proj", 0), ("w2", "down_proj", 1))
"""Mixtral's name, the dense name, and which dimension counts hidden neurons."""


class MoeRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """What is made of a dense model."""

    experts: int = 4
    experts_per_token: int = 2
    seed: int = 0
    """Of the orders of neurons and of the routers; the same seed gives the same bytes."""
    dtype: str = "float32"
    """Of the result; exact texts need float32."""


class MoeReport(msgspec.Struct, frozen=True):
    """What was made."""

    path: str
    layers: int
    experts: int
    parameters: int
    size_bytes: int


def upcycle(model: str, target: str, recipe: MoeRecipe | None = None, *, on_layer: Callable[[int, int], None] | None = None) -> MoeReport:
    """Write the mixture of experts of the dense checkpoint (or GGUF file) `model` to the new directory `target`.

    `on_layer(done, layers)` is told after each layer. ConfigurationError for a model that cannot be upcycled or a wrong recipe; SaveError
    when `target` is taken or writing fails, and then nothing of it is left.
    """
    recipe = recipe or MoeRecipe()
    _check(recipe)
    path = Path(target).expanduser()
    if path.exists() or path.is_symlink():
        raise SaveError(f"{str(path)!r} exists: name a new directory")
    source = find_source(model)
    dense = load_model(source, TorchEngineOptions(model=model, dtype=recipe.dtype, device="cpu"))
    config = _config(dense, recipe)
    tokenizer = load_tokenizer_of(source)
    workplace: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        report = _write(dense, config, recipe, workplace, on_layer or (lambda _done, _layers: None))
        if tokenizer is not None:
            tokenizer.save(workplace)
        workplace.chmod(0o755)  # mkdtemp gives 0700
        workplace.rename(path)
    except OSError as error:
        raise SaveError(f"cannot write {str(path)!r}: {error}; nothing was left there") from error
    finally:
        if workplace is not None:
            shutil.rmtree(workplace, ignore_errors=True)
    return msgspec.structs.replace(report, path=str(path))


def _check(recipe: MoeRecipe) -> None:
    if recipe.experts < 1:
        raise ConfigurationError(f"experts must be at least 1, not {recipe.experts}")
    if not 1 <= recipe.experts_per_token <= recipe.experts:
        raise ConfigurationError(f"experts_per_token must be between 1 and experts ({recipe.experts}), not {recipe.experts_per_token}")
    if recipe.dtype not in DTYPES or recipe.dtype == "auto":
        raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES[1:])}, not {recipe.dtype!r}")


def _config(dense: PreTrainedModel, recipe: MoeRecipe) -> MixtralConfig:
    given: Any = dense.config
    biases = [name for name, _ in dense.named_parameters() if name.endswith(".bias")]
    if given.model_type not in DENSE_TYPES or biases:
        why = f"its {biases[0]} has no place in Mixtral" if biases else f"only {' and '.join(DENSE_TYPES)} models can"
        raise ConfigurationError(f"a {given.model_type} model cannot be made a mixture of experts: {why}")
    taken = {name: getattr(given, name) for name in _TAKEN_OVER if getattr(given, name, None) is not None}
    taken.setdefault("sliding_window", None)
    return MixtralConfig(
        **taken,
        num_local_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        architectures=["MixtralForCausalLM"],
        dtype=recipe.dtype,
    )


def _write(
    dense: PreTrainedModel, config: MixtralConfig, recipe: MoeRecipe, folder: Path, on_layer: Callable[[int, int], None]
) -> MoeReport:
    """One shard a layer, so that never more than a layer of copies is in memory."""
    layers = int(config.num_hidden_layers)
    weights = dict(dense.named_parameters())  # tied ones once
    weight_map: dict[str, str] = {}
    parameters, size_bytes = 0, 0
    for part, tensors in enumerate(_shards(weights, layers, recipe)):
        name = f"model-{part + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors gives 0600, and other users' engines may read the rest of the checkpoint
        weight_map.update(dict.fromkeys(tensors, name))
        parameters += sum(tensor.numel() for tensor in tensors.values())
        size_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if part < layers:
            on_layer(part + 1, layers)
    index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config.save_pretrained(folder)
    if dense.generation_config is not None:
        dense.generation_config.save_pretrained(folder)
    return MoeReport("", layers, recipe.experts, parameters, size_bytes)


def _shards(weights: Mapping[str, torch.Tensor], layers: int, recipe: MoeRecipe) -> Iterator[Mapping[str, torch.Tensor]]:
    """The layers in order, then what is in none."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        own = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        yield {
            **{name: tensor.contiguous() for name, tensor in own.items() if not name.startswith(f"{prefix}mlp.")},
            **_experts(own, prefix, recipe, generator),
        }
    yield {name: tensor.contiguous() for name, tensor in weights.items() if not name.startswith("model.layers.")}


def _experts(own: Mapping[str, torch.Tensor], prefix: str, recipe: MoeRecipe, generator: torch.Generator) -> dict[str, torch.Tensor]:
    gate = own[f"{prefix}mlp.gate_proj.weight"]
    neurons, hidden = gate.shape
    moe = f"{prefix}block_sparse_moe."
    # normalised hidden states have elements of about 1: logits of about 1, so that tokens spread over the experts
    router = torch.randn(recipe.experts, hidden, generator=generator) / hidden**0.5
    tensors = {f"{moe}gate.weight": router.to(gate.dtype)}
    for expert in range(recipe.experts):
        order = torch.randperm(neurons, generator=generator)
        for name, dense_name, dimension in _MLP:
            weight = own[f"{prefix}mlp.{dense_name}.weight"]
            tensors[f"{moe}experts.{expert}.{name}.weight"] = weight.index_select(dimension, order).contiguous()
    return tensors
