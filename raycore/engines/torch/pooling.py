"""From hidden states to one vector a prompt: which way a checkpoint asks for, and the doing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from raycore.engine import EMBED, GENERATE, Task
from raycore.errors import ConfigurationError

MODULES_FILE = "modules.json"
"""sentence-transformers' list of what follows the model."""
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of architectures end that give tokens."""
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}


@dataclass(slots=True, frozen=True)
class Pooling:
    """mode: mean, cls (the first token), last or max, over the prompt's tokens; then to length 1 if it normalises."""

    mode: str
    normalises: bool = False
    max_tokens: int | None = None
    """The prompt that the checkpoint was made for, at most; None: the model's own limit."""


def task_of(wanted: str, directory: Path, config: PreTrainedConfig) -> Task:
    """The task to load a checkpoint for: as wanted, or what its files say."""
    if wanted != "auto":
        return EMBED if wanted == EMBED else GENERATE
    architectures: list[str] = getattr(config, "architectures", None) or []
    if (directory / MODULES_FILE).is_file():
        return EMBED
    return GENERATE if not architectures or any(name.endswith(_GENERATING) for name in architectures) else EMBED


def find_pooling(directory: Path, config: PreTrainedConfig) -> Pooling:
    """What the checkpoint's sentence-transformers files say; without them the last token of a causal model, the mean of any other.

    ConfigurationError for files that cannot be read, or that ask for what is not supported.
    """
    if not (directory / MODULES_FILE).is_file():
        architectures: list[str] = getattr(config, "architectures", None) or []
        is_causal = any(name.endswith(_GENERATING) for name in architectures)
        return Pooling("last" if is_causal else "mean")
    mode, normalises = None, False
    for module in _read(directory / MODULES_FILE, list):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        match kind:
            case "Transformer":
                if module.get("path"):
                    raise ConfigurationError(
                        f"{MODULES_FILE} keeps the model in {module['path']!r}; give that directory's checkpoint as model"
                    )
            case "Pooling":
                mode = _mode(directory / str(module.get("path", "")) / "config.json")
            case "Normalize":
                normalises = True
            case _:
                raise ConfigurationError(
                    f"{MODULES_FILE} asks for {kind or 'a nameless module'}; supported are Transformer, Pooling, Normalize"
                )
    if mode is None:
        raise ConfigurationError(f"{MODULES_FILE} names no Pooling")
    limits = directory / "sentence_bert_config.json"
    return Pooling(mode, normalises, _read(limits, dict).get("max_seq_length") if limits.is_file() else None)


def pool(hidden: torch.Tensor, lengths: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Hidden states [N, L, size], padded on the right to L, and lengths [N]; to vectors [N, size] float32."""
    hidden = hidden.float()
    if pooling.mode in ("cls", "last"):
        places = torch.zeros_like(lengths) if pooling.mode == "cls" else lengths - 1
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), places]
    else:
        is_padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]
        if pooling.mode == "max":
            vectors = hidden.masked_fill(is_padding[:, :, None], float("-inf")).amax(1)
        else:
            vectors = hidden.masked_fill(is_padding[:, :, None], 0.0).sum(1) / lengths[:, None]
    return torch.nn.functional.normalize(vectors, dim=-1) if pooling.normalises else vectors


def _mode(file: Path) -> str:
    config = _read(file, dict)
    named = config.get("pooling_mode")
    keys = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    modes = [named] if isinstance(named, str) else [str(_MODES.get(key, key)) for key in keys]
    wanted = ["last" if mode == "lasttoken" else mode for mode in modes]
    if len(wanted) != 1 or wanted[0] not in _MODES.values():
        supported = ", ".join(_MODES.values())
        raise ConfigurationError(f"{file} asks for the pooling {' and '.join(wanted) or 'of nothing'}; supported is one of {supported}")
    return wanted[0]


def _read(file: Path, kind: type[Any]) -> Any:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {str(file)!r}: {error}") from error
    if not isinstance(content, kind):
        raise ConfigurationError(f"{str(file)!r} holds no {kind.__name__}")
    return content
