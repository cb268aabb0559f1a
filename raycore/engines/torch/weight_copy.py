"""A model's weights as they go from an engine that serves to one that joins: what is lent, and how a model is built to take it."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from raycore.engine import EMBED, GENERATE, Task
from raycore.engines.torch.attention import ATTENTION_NAME
from raycore.engines.torch.expert_loading import ExpertModel, empty_share, expert_model_of
from raycore.engines.torch.loading import choose_device, choose_dtype
from raycore.engines.torch.options import TorchEngineOptions
from raycore.engines.torch.pooling import Pooling
from raycore.engines.torch.weight_transfer import TensorRow, receive_shares, send_share
from raycore.errors import RaycoreError, WeightCopyError
from raycore.groups import ProcessGroup
from raycore.tokenizer import HfTokenizer, Tokenizer, has_tokenizer
from raycore.weight_copies import Span, Spans, TensorFact, WeightManifest, WeightOffer, WeightSource

_log = logging.getLogger(__name__)

_CONFIG, _GENERATION, _POOLING = "config.json", "generation_config.json", "raycore_pooling.json"
_TOKENIZER = "tokenizer"
"""The directory of the tokenizer's files."""


@final
class LentModel:
    """Implements `LentWeights`: the tensors as they are when this is made, on the step thread; the rest on any thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None,
        *,
        task: Task,
        expert_tensors: frozenset[str] = frozenset(),
        pooling: Pooling | None = None,
    ) -> None:
        """`expert_tensors`: names of parameters that hold experts, which go another way."""
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.task = task
        self._tensors = [tensor.detach() for name, tensor in named.items() if name not in expert_tensors]
        self.manifest = WeightManifest(
            tuple(_fact(name, tensor) for name, tensor in named.items() if name not in expert_tensors),
            tuple(_fact(name, named[name][0]) for name in named if name in expert_tensors),
        )
        self._config, self._generation = model.config, getattr(model, "generation_config", None)
        self._tokenizer, self._pooling = tokenizer, pooling

    def files(self) -> dict[str, bytes]:
        """Of what is in memory."""
        files = {_CONFIG: _plain(self._config).to_json_string().encode()}
        if self._generation is not None:
            files[_GENERATION] = self._generation.to_json_string().encode()
        if self._pooling is not None:
            files[_POOLING] = json.dumps(asdict(self._pooling)).encode()
        if self._tokenizer is not None:
            with tempfile.TemporaryDirectory(prefix="raycore-") as folder:
                self._tokenizer.save(Path(folder))
                saved = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
                files |= {f"{_TOKENIZER}/{file.relative_to(folder)}": file.read_bytes() for file in saved}
        return files

    def give(self, group: ProcessGroup, shares: Sequence[Spans], portion_bytes: int) -> int:
        """See `send_share`."""
        return send_share(TensorRow(self._tensors), group, shares, portion_bytes)


@dataclass(slots=True, frozen=True)
class TakenModel:
    """A model whose weights came from peers; `experts`: what it has of them, where they are spread over the ranks and come later."""

    model: PreTrainedModel
    tokenizer: Tokenizer | None
    task: Task
    experts: ExpertModel | None
    pooling: Pooling | None


def is_lendable(model: PreTrainedModel) -> bool:
    """Whether a model is built from its configuration alone: one that is quantised is not. A GGUF file's is, once it is read."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return quantizer is None or bool(getattr(quantizer.quantization_config, "dequantize", False))


def take_model(source: WeightSource | None, options: TorchEngineOptions) -> TakenModel | None:
    """The model as the peers have it; None, with the reason in the log, where it is to be loaded from disk.

    WeightCopyError where the peers have it, and it may not be.
    """
    if source is None:
        return None
    offer = source.offer()
    if offer is None:
        return None
    try:
        taken, sink = _built(offer, options)
    except (RaycoreError, OSError, ValueError, RuntimeError) as error:
        _log.warning("weights do not come from peers, which have others, but from disk: %s", error)
        return None
    try:
        source.take(sink)
    except (RaycoreError, OSError, ValueError, RuntimeError) as error:
        if not source.or_disk:
            raise error if isinstance(error, RaycoreError) else WeightCopyError(f"weights did not come from peers: {error}") from error
        _log.warning("weights do not come from peers but from disk: %s", error)
        return None
    return taken


@final
class ModelSink:
    """Implements `WeightSink` over the tensors that a manifest names."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._row = TensorRow(tensors)

    def receive(self, group: ProcessGroup, shares: Sequence[Spans], portion_bytes: int, on_come: Callable[[Span], None]) -> None:
        """See `receive_shares`."""
        receive_shares(self._row, group, shares, portion_bytes, on_come)


def _built(offer: WeightOffer, options: TorchEngineOptions) -> tuple[TakenModel, ModelSink]:
    """A model without weights, with room for them. WeightCopyError where the offer is not what the options ask for, or does not fit."""
    task = EMBED if offer.task == EMBED else GENERATE
    if options.task not in ("auto", task):
        raise WeightCopyError(f"the peers' model is loaded to {task}, and this rank's is to {options.task}")
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory(prefix="raycore-") as folder:
        config, tokenizer = _unpacked(offer.files, Path(folder))
    wanted = choose_dtype(options.dtype, device)
    has = {fact.dtype for fact in offer.manifest.tensors}
    if isinstance(wanted, torch.dtype) and str(wanted) not in has:
        raise WeightCopyError(f"the peers' weights are {' and '.join(sorted(has))}, and this rank's are to be {wanted}")
    experts: ExpertModel | None = None
    if offer.manifest.by_expert:
        experts = expert_model_of(config)
        if experts is None:
            raise WeightCopyError("the peers spread experts, and their configuration has none")
        model = empty_share(experts)
    else:
        model = _empty(config, task)
    tensors = make_room(model, offer.manifest, device)
    if _GENERATION in offer.files:
        model.generation_config = GenerationConfig.from_dict(json.loads(offer.files[_GENERATION]))
    pooling = Pooling(**json.loads(offer.files[_POOLING])) if _POOLING in offer.files else None
    model = model.eval().requires_grad_(False)
    return TakenModel(model, tokenizer, task, experts, pooling), ModelSink(tensors)


def _unpacked(files: Mapping[str, bytes], folder: Path) -> tuple[PreTrainedConfig, Tokenizer | None]:
    """Read by transformers from a directory that is gone afterwards."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    inner = folder / _TOKENIZER
    return config, HfTokenizer(inner).loaded() if has_tokenizer(inner) else None


def _empty(config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    kind: Any = AutoModel if task == EMBED else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config, attn_implementation="sdpa" if task == EMBED else ATTENTION_NAME)


@torch.inference_mode(mode=False)
def make_room(model: PreTrainedModel, manifest: WeightManifest, device: torch.device) -> list[torch.Tensor]:
    """Give a model on the meta device tensors of the manifest's types; those that are to be filled, in the manifest's order.

    Tensors with a row for each expert have zeros. WeightCopyError where names or shapes are not the manifest's.
    """
    has = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    facts = {fact.name: fact for fact in manifest.tensors}
    rows = {fact.name: fact for fact in manifest.by_expert}
    differs = sorted(has.keys() ^ {*facts, *rows})
    differs += [name for name, fact in facts.items() if name in has and tuple(has[name].shape) != fact.shape]
    differs += [name for name, fact in rows.items() if name in has and tuple(has[name].shape[1:]) != fact.shape]
    if differs:
        raise WeightCopyError(f"the offered weights do not fit the model of their configuration: {differs[0]}")
    made = {name: torch.empty(fact.shape, dtype=_dtype(fact), device=device) for name, fact in facts.items()}
    zeros = {name: torch.zeros(has[name].shape, dtype=_dtype(fact), device=device) for name, fact in rows.items()}
    by_old = {id(old): {**made, **zeros}[name] for name, old in has.items()}
    _put(model, by_old)
    return [made[fact.name] for fact in manifest.tensors]


def _put(model: nn.Module, by_old: Mapping[int, torch.Tensor]) -> None:
    """Put tensors in the place of others, wherever those are: tied ones stay tied."""
    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            fresh = parameters.setdefault(id(old), nn.Parameter(by_old[id(old)], requires_grad=False))
            setattr(module, name, fresh)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, by_old[id(buffer)])
        left = next((name for name, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta), None)
        if left is not None:
            raise WeightCopyError(f"{path}.{left} is computed when the model is made, and stored nowhere")


def _fact(name: str, tensor: torch.Tensor) -> TensorFact:
    return TensorFact(name, str(tensor.dtype), tuple(tensor.shape), tensor.nbytes)


def _dtype(fact: TensorFact) -> torch.dtype:
    found = getattr(torch, fact.dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise WeightCopyError(f"{fact.name} is of a type that is not known here: {fact.dtype}")
    return found


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without the mark of a file that was dequantised when it was read."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        delattr(plain, "quantization_config")
    return plain
